"""Loops inside jitted functions, brought to where one meets what another saves for it.

The gradient of a function that calls a jitted one calls two: its forward and its
backward pass, each with the loops that it has. XLA inlines such calls before all else;
here it is done where a loop in one has to do with a loop in another.
"""

from collections.abc import Iterator
from typing import Any

import jax

from mpjax import _jaxpr
from mpjax._jaxpr import Literal, Var, open_jaxpr
from mpjax.autocast._decide import is_reserved


def with_loops_side_by_side(jaxpr: Any) -> Any:
    """Returns a jaxpr in which a scan and what takes of its results are not in jits.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the very object if nothing changed.
    """
    return _jaxpr.map_jaxprs(_inline, jaxpr)


def _inline(jaxpr: Any) -> Any:
    body = open_jaxpr(jaxpr)
    loops = [eqn for eqn in body.eqns if _has_scan(eqn)]
    made = {v for eqn in loops for v in eqn.outvars}
    taken = (x for eqn in loops for x in eqn.invars if not isinstance(x, Literal))
    if made.isdisjoint(taken) or not any(map(_is_plain_call, loops)):
        return jaxpr
    names: dict[Var, Any] = {}
    eqns = list(_flattened(body.eqns, names))
    outvars = _renamed(body.outvars, names)
    return _jaxpr.with_equations(jaxpr, eqns=eqns, outvars=outvars)


def _has_scan(eqn: Any) -> bool:
    if eqn.primitive.name == "jit":
        return any(map(_has_scan, open_jaxpr(eqn.params["jaxpr"]).eqns))
    return eqn.primitive.name == "scan"


def _is_plain_call(eqn: Any) -> bool:
    """Whether it is a jitted function without effects, of which nothing is asked."""
    if eqn.primitive.name != "jit" or is_reserved(eqn) or eqn.effects:
        return False
    usual = _call_params(len(eqn.invars), len(eqn.outvars))
    return all(eqn.params.get(name, value) == value for name, value in usual.items())


def _call_params(num_ins: int, num_outs: int) -> dict[str, Any]:
    """Returns the parameters of a jitted function of which nothing is asked."""
    with jax.disable_jit(False):
        fn = jax.jit(lambda *_: [0.0] * num_outs)
        (eqn,) = jax.make_jaxpr(fn)(*[0.0] * num_ins).eqns
    free = ("jaxpr", "name", "inline", "keep_unused")
    return {name: value for name, value in eqn.params.items() if name not in free}


def _constants(call: Any) -> list[Any]:
    """Returns a call, if one is needed, that gives the constants of another."""
    jaxpr = call.params["jaxpr"]
    constvars = open_jaxpr(jaxpr).constvars
    if not constvars:
        return []
    jaxpr = _jaxpr.with_equations(jaxpr, invars=[], outvars=[*constvars], eqns=[])
    params = call.params | _call_params(0, len(constvars)) | {"jaxpr": jaxpr}
    outvars = [Var(v.aval) for v in constvars]
    return [call.replace(invars=[], outvars=outvars, params=params)]


def _flattened(eqns: Any, names: dict[Var, Any], call: Any = None) -> Iterator[Any]:
    """Yields equations, in place of a call with a scan inside those that it makes.

    Args:
      eqns: of one jaxpr.
      names: what variables are called in the result, where that is not their own name;
        learns how the results of the equations are.
      call: the one that makes them, if any.
    """
    for eqn in eqns:
        invars = _renamed(eqn.invars, names)
        if call is not None:
            eqn = _jaxpr.as_inside(call, eqn)
        if _has_scan(eqn) and _is_plain_call(eqn):
            inner = open_jaxpr(eqn.params["jaxpr"])
            inside: dict[Var, Any] = dict(zip(inner.invars, invars, strict=True))
            for constants in _constants(eqn):
                inside.update(zip(inner.constvars, constants.outvars, strict=True))
                yield constants
            yield from _flattened(inner.eqns, inside, eqn)
            outvars = _renamed(inner.outvars, inside)
        elif call is None:
            yield eqn.replace(invars=invars)
            continue
        else:
            # The same function can be called twice.
            outvars = [Var(v.aval) for v in eqn.outvars]
            yield eqn.replace(invars=invars, outvars=outvars)
        names.update(zip(eqn.outvars, outvars, strict=True))


def _renamed(atoms: Any, names: dict[Var, Any]) -> list[Any]:
    return [x if isinstance(x, Literal) else names.get(x, x) for x in atoms]
