"""Hints for XLA:CPU, which change no value; on any other device they are not there.

There a training step waits for memory more than for arithmetic: what is written to
memory that was not in use before costs several times the same in place.
"""

from typing import Any

import jax


def apart(values: list[jax.Array]) -> list[jax.Array]:
    """Returns the same values; what is computed of them is not merged with the rest.

    A half gradient is cast to float32 for its norm and for the optimizer. Merged into
    one, that cast is computed and kept for the norm; apart, each is part of what it is
    for.
    """
    return jax.lax.platform_dependent(
        values, cpu=jax.lax.optimization_barrier, default=lambda values: values
    )


def after(pred: jax.Array, values: Any) -> jax.Array:
    """Returns `pred`, but not before `values` are computed.

    New parameters are computed from the old moments, and so are new moments. Which is
    first is not known to XLA, so it copies the old moments, unless the new ones wait
    for the parameters; then they take the place of the old.

    Args:
      pred: boolean scalar, on which the new moments depend.
      values: the new parameters, any pytree of arrays.
    """
    return jax.lax.platform_dependent(
        pred,
        values,
        cpu=lambda pred, values: jax.lax.optimization_barrier((pred, values))[0],
        default=lambda pred, values: pred,
    )
