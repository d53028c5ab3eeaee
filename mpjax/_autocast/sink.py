"""Sinks broadcasts into the scans that take their results.

JAX moves what does not change from step to step out of a loop that it differentiates: a
mask, or the number that fills it, then stands in memory at the size of the scores of an
attention layer, where the loop could broadcast it as it goes.
"""

from typing import Any

from mpjax._jaxpr.core import (
    Literal,
    Var,
    inner_jaxprs,
    is_var,
    may_change_operands,
    num_bytes,
    open_jaxpr,
    with_equations,
)
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.passes import map_jaxprs


def sink_broadcasts_into_scans(jaxpr: Any) -> Any:
    """Returns a jaxpr whose scans broadcast their constants inside.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """
    return map_jaxprs(_sink_all, jaxpr)


def _sink_all(jaxpr: Any) -> Any:
    """Sinks the broadcasts of one jaxpr, not of inner ones."""
    body = open_jaxpr(jaxpr)
    broadcasts: dict[Var, Any] = {}
    for eqn in body.eqns:
        broadcasts |= _broadcasts_of(eqn)
    eqns = [_sink(eqn, broadcasts) for eqn in body.eqns]
    if all(new is old for new, old in zip(eqns, body.eqns, strict=True)):
        return jaxpr
    return with_equations(jaxpr, eqns=eqns)


def _broadcasts_of(eqn: Any) -> dict[Var, Any]:
    """Returns an equation per result that is broadcast from an operand or a number.

    `jnp.where` broadcasts inside a jit of its own.
    """
    if _is_widening(eqn):
        return {eqn.outvars[0]: eqn}
    inner = inner_jaxprs(eqn)
    if eqn.primitive.name != "jit" or not inner:
        return {}
    body = open_jaxpr(inner[0])
    made_by = {e.outvars[0]: e for e in body.eqns if _is_widening(e)}
    outside = dict(zip(body.invars, eqn.invars, strict=True))
    found = {}
    for out, var in zip(eqn.outvars, body.outvars, strict=True):
        made = made_by.get(var) if is_var(var) else None
        if made is None:
            continue
        (source,) = made.invars
        source = outside.get(source) if is_var(source) else source
        if source is not None:
            found[out] = made.replace(invars=[source], outvars=[out])
    return found


def _is_widening(eqn: Any) -> bool:
    """Whether an equation broadcasts a number or an array to more bytes."""
    if eqn.primitive.name != "broadcast_in_dim" or len(eqn.invars) != 1:
        return False
    before, after = num_bytes(eqn.invars[0]), num_bytes(eqn.outvars[0])
    is_known = isinstance(before, int) and isinstance(after, int)
    return is_known and before < after


def _sink(eqn: Any, broadcasts: dict[Var, Any]) -> Any:
    """Returns a scan that takes what is broadcast; any other equation as it is."""
    if eqn.primitive.name != "scan" or not may_change_operands(eqn):
        return eqn
    scan = Scan(eqn)
    consts, carry, xs = scan.split_operands(eqn.invars)
    inner_consts, *inner_rest = scan.split_operands(scan.body.invars)
    outer, inner, before = [], [], []
    for operand, var in zip(consts, inner_consts, strict=True):
        while is_var(operand) and operand in broadcasts:
            made = broadcasts[operand]
            (operand,) = made.invars
            source = operand if isinstance(operand, Literal) else Var(operand.aval)
            before.append(made.replace(invars=[source], outvars=[var]))
            var = source
        if is_var(operand):
            outer.append(operand)
            inner.append(var)
    if not before:
        return eqn
    jaxpr = with_equations(
        scan.jaxpr,
        invars=[*inner, *inner_rest[0], *inner_rest[1]],
        eqns=[*reversed(before), *scan.body.eqns],
    )
    return scan.rebuild(jaxpr, num_consts=len(outer), invars=[*outer, *carry, *xs])
