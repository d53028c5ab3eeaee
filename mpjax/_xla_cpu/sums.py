"""Half sums of float32 operands, which XLA:CPU adds in float32 anyway.

XLA:CPU has no arithmetic in half: for a half sum it rounds both operands, casts them
back, adds in float32 and rounds the sum. So there the operands are added as they are,
and the sum, which is what has to be half, is rounded once.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mpjax._jaxpr.core import (
    MadeHalf,
    Var,
    call_eqn,
    dtype_of,
    is_split,
    is_var,
    open_jaxpr,
    with_equations,
)
from mpjax._jaxpr.passes import map_jaxprs
from mpjax._jaxpr.primitives import facts_of
from mpjax._xla_cpu import switch

_FLOAT32 = jnp.dtype(jnp.float32)


def round_half_sums_once(jaxpr: Any) -> Any:
    """Rounds sums that autocast made half once on a CPU; elsewhere nothing changes.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """
    return map_jaxprs(_round_once, jaxpr) if switch.is_on else jaxpr


def _round_once(jaxpr: Any) -> Any:
    wide: dict[
        Var, Var
    ] = {}  # by a half variable, the float32 one that it is cast from
    eqns, has_changed = [], False
    for eqn in open_jaxpr(jaxpr).eqns:
        if eqn.primitive.name == "convert_element_type":
            (x,), (out,) = eqn.invars, eqn.outvars
            if is_var(x) and dtype_of(x) == _FLOAT32:
                wide[out] = x
        elif _is_half_sum(eqn):
            operands = [wide.get(x, x) if is_var(x) else x for x in eqn.invars]
            if any(new is not x for new, x in zip(operands, eqn.invars, strict=True)):
                eqns.append(_rounded_once(eqn, operands))
                has_changed = True
                continue
        eqns.append(eqn)
    return with_equations(jaxpr, eqns=eqns) if has_changed else jaxpr


def _is_half_sum(eqn: Any) -> bool:
    is_own = isinstance(eqn.params, MadeHalf) and facts_of(eqn).is_sum
    return is_own and not any(map(is_split, (*eqn.invars, *eqn.outvars)))


def _rounded_once(eqn: Any, operands: list[Any]) -> Any:
    """Returns the equation of a sum whose operands are float32, or half."""
    dtype = dtype_of(eqn.outvars[0])

    def half(x, y):
        return eqn.primitive.bind(x.astype(dtype), y.astype(dtype))

    def once(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return eqn.primitive.bind(x, y).astype(dtype)

    def half_sum(x, y):
        return jax.lax.platform_dependent(x, y, cpu=once, default=half)

    return call_eqn(half_sum, operands, eqn.outvars, like=eqn)
