"""Inlines calls of jitted functions, so that forward and backward scan are siblings.

The gradient of a function that calls a jitted function calls two: its forward and its
backward pass, each with its own scans. XLA inlines such calls before all else; here
calls are inlined where stacked arrays of a scan pass from one to another.
"""

from collections.abc import Iterator
from typing import Any

import jax

from mpjax._jaxpr.core import (
    Var,
    as_inside,
    has_effects,
    is_annotated,
    is_var,
    open_jaxpr,
    renamed,
    with_equations,
)
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.passes import map_jaxprs
from mpjax._jaxpr.provenance import is_reserved


def inline_calls_with_scans(jaxpr: Any) -> Any:
    """Inlines calls of jitted functions whose scans pass stacked arrays on.

    A call that asks for more than its computation (shardings, donation, effects) stays.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """
    return map_jaxprs(_Inliner().inline, jaxpr)


def returns_constants(eqn: Any) -> bool:
    """Whether an equation returns the constants of a call that was inlined."""
    return (
        eqn.primitive.name == "jit"
        and not eqn.invars
        and not open_jaxpr(eqn.params["jaxpr"]).eqns
    )


def empty_call(num_ins: int, num_outs: int) -> Any:
    """Returns the equation of a jitted function that asks for nothing more.

    Args:
      num_ins: its number of operands, scalars.
      num_outs: its number of results, constants.
    """
    with jax.disable_jit(False):
        fn = jax.jit(lambda *_: [0.0] * num_outs)
        (eqn,) = jax.make_jaxpr(fn)(*[0.0] * num_ins).eqns
    return eqn


class _Inliner:
    """Inlines calls, and caches what it finds out about them."""

    def __init__(self):
        self._stack_indices: dict[int, tuple[Any, list[int], list[int]]] = {}
        self._plain_params: dict[tuple[int, int], dict[str, Any]] = {}

    def inline(self, jaxpr: Any) -> Any:
        """Returns a jaxpr, closed or open, without such calls at its top level."""
        while calls := self._related_calls(open_jaxpr(jaxpr).eqns):
            names: dict[Var, Any] = {}
            eqns = list(_flattened(open_jaxpr(jaxpr).eqns, calls, names))
            outvars = renamed(open_jaxpr(jaxpr).outvars, names)
            jaxpr = with_equations(jaxpr, eqns=eqns, outvars=outvars)
        return jaxpr

    def _related_calls(self, eqns: Any) -> set[int]:
        """Returns the indices of calls that pass stacks to one another, or to scans."""
        made_by: dict[Var, int] = {}
        related: set[int] = set()
        for index, eqn in enumerate(eqns):
            taken, made = self._stacks(eqn)
            if not (taken or made) or not (_is_scan(eqn) or self._is_plain(eqn)):
                continue
            for x in taken:
                if is_var(x) and x in made_by:
                    related |= {index, made_by[x]}
            made_by |= dict.fromkeys(made, index)
        return {index for index in related if not _is_scan(eqns[index])}

    def _stacks(self, eqn: Any) -> tuple[list[Any], list[Any]]:
        """Returns the stacked operands and the stacked results of a scan.

        A call has the stacks of the scans inside it.
        """
        if _is_scan(eqn):
            scan = Scan(eqn)
            *_, xs = scan.split_operands(eqn.invars)
            _, ys = scan.split_results(eqn.outvars)
            return xs, ys
        if eqn.primitive.name != "jit":
            return [], []
        jaxpr = eqn.params["jaxpr"]
        if id(jaxpr) not in self._stack_indices:
            pairs = [self._stacks(each) for each in open_jaxpr(jaxpr).eqns]
            taken = {x for xs, _ in pairs for x in xs if is_var(x)}
            made = {y for _, ys in pairs for y in ys}
            invars, outvars = open_jaxpr(jaxpr).invars, open_jaxpr(jaxpr).outvars
            ins = [i for i, x in enumerate(invars) if x in taken]
            outs = [i for i, y in enumerate(outvars) if is_var(y) and y in made]
            self._stack_indices[id(jaxpr)] = (jaxpr, ins, outs)
        _, ins, outs = self._stack_indices[id(jaxpr)]
        return [eqn.invars[i] for i in ins], [eqn.outvars[i] for i in outs]

    def _is_plain(self, call: Any) -> bool:
        """Whether inlining a call loses nothing that it asks for."""
        inside = open_jaxpr(call.params["jaxpr"]).eqns
        if is_reserved(call) or is_annotated(call):
            return False
        if any(map(has_effects, [call, *inside])):
            return False
        sizes = len(call.invars), len(call.outvars)
        if sizes not in self._plain_params:
            self._plain_params[sizes] = _call_params(*sizes)
        usual = self._plain_params[sizes]
        return all(call.params.get(name) == value for name, value in usual.items())


def _is_scan(eqn: Any) -> bool:
    return eqn.primitive.name == "scan"


def _call_params(num_ins: int, num_outs: int) -> dict[str, Any]:
    """Returns the parameters of a jitted function that asks for nothing more."""
    free = ("jaxpr", "name", "inline", "keep_unused")
    params = empty_call(num_ins, num_outs).params
    return {name: value for name, value in params.items() if name not in free}


def _flattened(eqns: Any, calls: set[int], names: dict[Var, Any]) -> Iterator[Any]:
    """Yields equations, with some calls replaced by what is inside them.

    Args:
      eqns: the equations of one jaxpr.
      calls: the indices of the calls.
      names: receives the new name of each result of the calls.
    """
    constants: dict[int, Var] = {}
    for index, eqn in enumerate(eqns):
        invars = renamed(eqn.invars, names)
        if index not in calls:
            yield eqn.replace(invars=invars)
            continue
        inner = open_jaxpr(eqn.params["jaxpr"])
        values = list(map(id, eqn.params["jaxpr"].consts))
        if not constants.keys() >= set(values):
            call = _call_for_constants(eqn)
            constants = dict(zip(values, call.outvars, strict=True)) | constants
            yield call
        inside: dict[Var, Any] = dict(zip(inner.invars, invars, strict=True))
        inside |= {
            v: constants[i] for v, i in zip(inner.constvars, values, strict=True)
        }
        for each in inner.eqns:
            # New variables: the same function can be called twice.
            outvars = [Var(v.aval) for v in each.outvars]
            operands = renamed(each.invars, inside)
            yield as_inside(eqn, each).replace(invars=operands, outvars=outvars)
            inside.update(zip(each.outvars, outvars, strict=True))
        names.update(zip(eqn.outvars, renamed(inner.outvars, inside), strict=True))


def _call_for_constants(call: Any) -> Any:
    """Returns a call that returns the constants of another.

    An open jaxpr has no place for constants.
    """
    jaxpr = call.params["jaxpr"]
    constvars = open_jaxpr(jaxpr).constvars
    jaxpr = with_equations(jaxpr, invars=[], outvars=[*constvars], eqns=[])
    params = call.params | _call_params(0, len(constvars)) | {"jaxpr": jaxpr}
    outvars = [Var(v.aval) for v in constvars]
    return call.replace(invars=[], outvars=outvars, params=params, effects=set())
