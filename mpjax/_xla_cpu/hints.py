"""Hints for XLA:CPU, which change no value and are absent on any other device.

A training step on a CPU waits for memory more than for arithmetic: writing to memory
that was not in use before costs several times as much as writing in place.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mpjax._jaxpr.core import Var, call_eqn
from mpjax._xla_cpu import switch


def prevent_fusion(values: Any) -> Any:
    """Returns the same arrays, any pytree, behind a barrier that no fusion crosses.

    A half gradient is cast to float32 for its norm and for the optimizer. If both share
    one cast, XLA computes it for the norm and stores it; behind a barrier, each cast is
    fused into the computation that needs it.
    """
    if not switch.is_on:
        return values
    return jax.lax.platform_dependent(
        values, cpu=jax.lax.optimization_barrier, default=lambda values: values
    )


def stored(x: Any, *, like: Any) -> Any:
    """Returns the equation of an array that is stored before it is read.

    Its output is the same array, as `prevent_fusion` returns it.

    Args:
      x: a variable.
      like: the equation that is to read the output; source line, name scope and context
        are its own.
    """
    return call_eqn(prevent_fusion, [x], [Var(x.aval)], like=like)


def write_after(earlier: Any, new: Any, old: Any) -> Any:
    """Returns `new`, which is not written over `old` before `earlier` is computed.

    New parameters are computed from the old moments, and so are new moments. XLA does
    not know which comes first, so it copies the old moments, unless the new ones wait
    for the parameters; then they are written in place.

    What makes them wait is a selection by a predicate that is always true. It stands
    behind the train step's own selection: if that one waited, XLA would compute the
    new moments once, for both, and store them beside the old.

    Args:
      earlier: the new parameters, any pytree of arrays.
      new: the new moments, any pytree of arrays.
      old: the old moments, like `new`.
    """
    if not switch.is_on:
        return new

    def wait(earlier, new, old):
        always, _ = jax.lax.optimization_barrier((jnp.array(True), earlier))
        return jax.tree.map(lambda n, o: jnp.where(always, n, o), new, old)

    return jax.lax.platform_dependent(
        earlier, new, old, cpu=wait, default=lambda earlier, new, old: new
    )
