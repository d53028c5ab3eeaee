"""Hoists casts of weights out of the scans that repeat them at every step.

XLA leaves such a cast in the loop. If the cast were simply moved before the loop, the
derivative of the loop would accumulate the gradient of the weight in half, step by
step. So the loop takes both: the half weight for the value, the float32 weight for the
derivative.
"""

import functools
from typing import Any

import jax

from mpjax._jaxpr.core import (
    Literal,
    Var,
    dtype_of,
    is_float32,
    may_change_operands,
    with_equations,
)
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.passes import map_equations
from mpjax._tree import is_half


def hoist_casts_out_of_scans(jaxpr: Any) -> Any:
    """Returns a jaxpr whose scans do not cast their constants at every step.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """
    return map_equations(_hoist, jaxpr)


def _hoist(eqn: Any) -> list[Any]:
    """Returns the casts of a scan's constants, and the scan; others as they are."""
    if eqn.primitive.name != "scan" or not may_change_operands(eqn):
        return [eqn]
    scan = Scan(eqn)
    consts, carry, xs = scan.split_operands(eqn.invars)
    inner_consts, inner_carry, inner_xs = scan.split_operands(scan.body.invars)
    outside = dict(zip(inner_consts, consts, strict=True))
    halves: dict[tuple[Var, Any], Var] = {}
    before, operands, eqns = [], [], list(scan.body.eqns)
    for index, cast in enumerate(eqns):
        weight = outside.get(cast.invars[0]) if _is_cast_to_half(cast) else None
        if weight is None or isinstance(weight, Literal):
            continue
        out = cast.outvars[0]
        half_of_eqn = _half_of_eqn(cast.invars[0].aval, out.aval, cast.ctx)
        if half_of_eqn is None:
            continue
        key = (cast.invars[0], dtype_of(out))
        if key not in halves:
            halves[key] = Var(out.aval)
            outer_cast = cast.replace(invars=[weight], outvars=[Var(out.aval)])
            operands.append(Var(out.aval))
            before += [outer_cast, _stop_gradient_eqn(outer_cast, operands[-1])]
        eqns[index] = half_of_eqn.replace(
            invars=[cast.invars[0], halves[key]],
            outvars=[out],
            source_info=cast.source_info,
            ctx=cast.ctx,
        )
    if not before:
        return [eqn]
    invars = [*inner_consts, *halves.values(), *inner_carry, *inner_xs]
    jaxpr = with_equations(scan.jaxpr, invars=invars, eqns=eqns)
    operands = [*consts, *operands, *carry, *xs]
    num_consts = len(consts) + len(halves)
    return [*before, scan.rebuild(jaxpr, num_consts=num_consts, invars=operands)]


def _is_cast_to_half(eqn: Any) -> bool:
    return (
        eqn.primitive.name == "convert_element_type"
        and not isinstance(eqn.invars[0], Literal)
        and is_float32(eqn.invars[0].aval)
        and is_half(eqn.outvars[0].aval)
    )


def _stop_gradient_eqn(cast: Any, out: Var) -> Any:
    """Returns a `stop_gradient` of a cast's result."""
    with jax.disable_jit(False):
        (stop,) = jax.make_jaxpr(jax.lax.stop_gradient)(0.0).eqns
    return cast.replace(
        primitive=stop.primitive, params=stop.params, invars=cast.outvars, outvars=[out]
    )


@jax.custom_jvp
def _half_of(weight: Any, half: Any) -> Any:
    """Returns `half`, which is `weight` cast, with the derivative of the cast."""
    del weight
    return half


@_half_of.defjvp
def _(primals: Any, tangents: Any) -> tuple[Any, Any]:
    half = primals[1]
    return half, jax.lax.convert_element_type(tangents[0], half.dtype)


@functools.lru_cache(maxsize=1024)
def _half_of_eqn(weight: Any, half: Any, context: Any) -> Any:
    """Returns the equation of `_half_of` for two types, or None if it has none."""
    with jax.disable_jit(False), context.manager:
        (eqn,) = jax.make_jaxpr(_half_of)(weight, half).eqns
    avals = [x.aval for x in (*eqn.invars, *eqn.outvars)]
    return eqn if avals == [weight, half, half] else None
