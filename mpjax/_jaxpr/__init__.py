"""Jaxprs: what is known of primitives, and taking apart, rebuilding, evaluating."""
