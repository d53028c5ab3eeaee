"""Hints for XLA:CPU, which change no value and are absent on any other device.

A training step on a CPU waits for memory more than for arithmetic: writing to memory
that was not in use before costs several times as much as writing in place.
"""

from typing import Any

import jax

from mpjax._xla_cpu import switch


def prevent_fusion(values: list[jax.Array]) -> list[jax.Array]:
    """Returns the same values, behind a barrier that no fusion crosses.

    A half gradient is cast to float32 for its norm and for the optimizer. If both share
    one cast, XLA computes it for the norm and stores it; behind a barrier, each cast is
    fused into the computation that needs it.
    """
    if not switch.is_on:
        return values
    return jax.lax.platform_dependent(
        values, cpu=jax.lax.optimization_barrier, default=lambda values: values
    )


def order_after(pred: jax.Array, values: Any) -> jax.Array:
    """Returns `pred`, but not before `values` are computed.

    New parameters are computed from the old moments, and so are new moments. XLA does
    not know which comes first, so it copies the old moments, unless the new ones wait
    for the parameters; then they are written in place.

    Args:
      pred: boolean scalar, on which the new moments depend.
      values: the new parameters, any pytree of arrays.
    """
    if not switch.is_on:
        return pred
    return jax.lax.platform_dependent(
        pred,
        values,
        cpu=lambda pred, values: jax.lax.optimization_barrier((pred, values))[0],
        default=lambda pred, values: pred,
    )
