"""Data sets, and the protocol that the training loop asks of them."""
