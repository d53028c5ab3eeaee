"""Optimizers with the constants of the sources that experiments reproduce."""

import optax

WARM_UP = 0.1  # share of the steps in which the learning rate rises


def rmsprop(learning_rate: float) -> optax.GradientTransformation:
    """Returns RMSprop with Keras's constants: rho 0.9, epsilon 1e-7 inside the root."""
    return optax.rmsprop(learning_rate, decay=0.9, eps=1e-7, eps_in_sqrt=True)


def one_cycle(learning_rate: float, num_steps: int) -> optax.Schedule:
    """Returns a learning rate that rises for a tenth of the steps, then falls to 0.

    Args:
      learning_rate: the largest, reached after the rise, which is linear; the fall is a
        half cosine.
      num_steps: steps in all.
    """
    warm_up = max(1, round(WARM_UP * num_steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warm_up, max(2, num_steps)
    )
