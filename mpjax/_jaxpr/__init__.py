"""Jaxprs: facts about primitives, and tools to read, rebuild and evaluate jaxprs."""
