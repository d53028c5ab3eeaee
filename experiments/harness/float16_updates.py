"""Float16 weights updated in float16, as in "Mixed Precision Training", Figure 2a.

arXiv:1710.03740, section 3.1, names two ways in which such an update is lost: it is
below 2^-24, the smallest float16 number, and becomes zero; or it is less than a 2048th
of its weight, and the sum rounds back to the weight.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

_EXPONENT_BITS, _MANTISSA_BITS = 5, 10
_SMALLEST_NORMAL = 2.0**-14
_SPACING_OF_SUBNORMALS = 2.0**-24


def round_to_float16(x: jax.Array) -> jax.Array:
    """Rounds float32 numbers to the nearest float16 numbers, as a cast does.

    XLA may leave out a cast to float16 and back (`xla_allow_excess_precision`, on GPUs
    by default); these operations it may not. `lax.reduce_precision` alone would flush
    subnormal numbers, below 2^-14, to zero.

    Args:
      x: float32 array of any shape.

    Returns:
      A float32 array of numbers that float16 represents, or Inf beyond 65520; ties to
      even.
    """
    normal = lax.reduce_precision(x, _EXPONENT_BITS, _MANTISSA_BITS)
    multiples = lax.round(
        x * (1 / _SPACING_OF_SUBNORMALS), lax.RoundingMethod.TO_NEAREST_EVEN
    )
    subnormal = multiples * _SPACING_OF_SUBNORMALS
    return jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, subnormal, normal)


def with_float16_updates(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Rounds the updates of an optimizer to float16, before they are added.

    A float16 weight plus such an update, added in float32 and rounded once to float16,
    is bitwise the float16 sum: the float32 sum of two float16 numbers has bits enough
    that its rounding does not matter to the next (24 >= 2 * 11 + 2).

    `tx` keeps float32 moments, and sees gradients unscaled, inside `with_loss_scale`.

    Args:
      tx: any optax transform.

    Returns:
      An optax transform with the state of `tx`; its updates are float32 arrays of
      float16 numbers.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        updates, state = tx.update(updates, state, params, **extra_args)
        return jax.tree.map(_round_leaf, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _round_leaf(update: jax.Array) -> jax.Array:
    return round_to_float16(jnp.asarray(update, jnp.float32))
