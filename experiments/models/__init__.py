"""Models, in flax.linen."""
