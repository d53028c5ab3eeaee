"""Optimizers with the constants of the sources that experiments reproduce."""

import optax


def rmsprop(learning_rate: float) -> optax.GradientTransformation:
    """Returns RMSprop with Keras's constants: rho 0.9, epsilon 1e-7 inside the root."""
    return optax.rmsprop(learning_rate, decay=0.9, eps=1e-7, eps_in_sqrt=True)
