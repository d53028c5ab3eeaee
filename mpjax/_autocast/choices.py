"""The dtype of a `half_precision` function where it depends on the name scope.

Rules by name scope may ask for several dtypes, and the scope of a call is not known
before the whole program is traced: JAX traces a jitted function or a loop without the
scope around it. So the function is traced in each dtype, as a branch of a conditional,
and autocast then replaces each conditional, those of the backward pass too, by the
branch that the rules ask for.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._autocast.inline import empty_call
from mpjax._autocast.tracing import dtypes_of
from mpjax._jaxpr.core import inner_jaxprs, map_inner_jaxprs, open_jaxpr, with_equations
from mpjax._jaxpr.provenance import RESERVED_AUTOCAST, RESERVED_HALF, join_scope
from mpjax.policy import PolicyRules


def half_name(candidates: tuple[str, ...], name: str) -> str:
    """Returns the reserved name of a function that is traced in one of some dtypes."""
    return f"{RESERVED_HALF}_{'-'.join(candidates)}_{name}"


def trace_in_each(
    traced_in: Callable[..., Any], candidates: tuple[str, ...], *args: Any
) -> Any:
    """Traces a function in each dtype in which it can be traced.

    Args:
      traced_in: `(dtype, candidates) -> function`, whose name is that of `half_name`.
      candidates: the dtypes that the rules ask for, the default's first.
      *args: the arguments of the function.

    Returns:
      Its outputs in the first dtype, from a conditional if there are several dtypes.
    """
    if len(candidates) == 1:
        return traced_in(*candidates, candidates)(*args)
    errors: dict[str, Exception] = {}
    for dtype in candidates:
        try:
            jax.eval_shape(traced_in(dtype, candidates), *args)
        except Exception as error:  # The user's function may refuse a dtype as it will.
            errors[dtype] = error
    if len(errors) == len(candidates):
        raise errors[candidates[0]]
    possible = tuple(dtype for dtype in candidates if dtype not in errors)
    fns = [traced_in(dtype, possible) for dtype in possible]
    return jax.lax.switch(0, _with_same_dtypes(fns, args), *args)


def choose_by_scope(jaxpr: Any, rules: PolicyRules, scope: str = "") -> Any:
    """Replaces each conditional over dtypes by the branch that the rules ask for.

    Args:
      jaxpr: closed or open.
      rules: the policies by name scope.
      scope: the name scope of the jaxpr.

    Returns:
      The jaxpr; the same object if there is nothing to choose.

    Raises:
      ValueError: if a function cannot be traced in the dtype that a rule asks for.
    """
    return _Chooser(rules).rewrite(jaxpr, scope) if len(dtypes_of(rules)) > 1 else jaxpr


class _Chooser:
    """Chooses, once per jaxpr and scope."""

    def __init__(self, rules: PolicyRules):
        self._rules = rules
        self._done: dict[Any, tuple[Any, Any]] = {}

    def rewrite(self, jaxpr: Any, scope: str) -> Any:
        """Returns a jaxpr, closed or open, with every choice made."""
        key = (id(jaxpr), scope)
        if key not in self._done:
            old = open_jaxpr(jaxpr).eqns
            new = [self._rewrite_eqn(eqn, join_scope(scope, eqn)) for eqn in old]
            is_same = all(a is b for a, b in zip(new, old, strict=True))
            result = jaxpr if is_same else with_equations(jaxpr, eqns=new)
            self._done[key] = (jaxpr, result)
        return self._done[key][1]

    def _rewrite_eqn(self, eqn: Any, scope: str) -> Any:
        name = str(eqn.params.get("name"))
        if name.startswith(RESERVED_AUTOCAST):
            return eqn  # It has chosen by its own rules.
        possible = _possible_dtypes(name)
        if len(possible) == 1:
            self._choose(possible, name, scope)
        elif eqn.primitive.name == "cond":
            eqn = self._without_choice(eqn, scope)
        if all(self.rewrite(x, scope) is x for x in inner_jaxprs(eqn)):
            return eqn
        rewrite = functools.partial(self.rewrite, scope=scope)
        return eqn.replace(params=map_inner_jaxprs(rewrite, eqn.params))

    def _without_choice(self, cond: Any, scope: str) -> Any:
        """Returns a call of the chosen branch; the conditional if it is another's."""
        for branch in cond.params["branches"]:
            for eqn in open_jaxpr(branch).eqns:
                name = str(eqn.params.get("name"))
                possible = _possible_dtypes(name)
                if len(possible) > 1:
                    chosen = self._choose(possible, name, scope)
                    jaxpr = cond.params["branches"][possible.index(chosen)]
                    return _call(jaxpr, half_name((chosen,), "chosen"), cond)
        return cond

    def _choose(self, possible: tuple[str, ...], name: str, scope: str) -> str:
        """Returns the dtype that the rules ask for."""
        dtype = jnp.dtype(self._rules.policy_for(scope).compute_dtype).name
        if dtype not in possible:
            raise ValueError(
                f"the policy at the name scope {scope!r} computes in {dtype}, but "
                f"the function {_function_name(name)} in half_precision can only be "
                f"traced in {', '.join(possible)}: give this scope another policy, or "
                f"call there a function that takes {dtype}."
            )
        return dtype


def _with_same_dtypes(fns: list[Callable[..., Any]], args: Any) -> list[Any]:
    """Returns functions whose outputs are cast to the dtypes of those of the first."""
    shapes = jax.eval_shape(fns[0], *args)

    def cast(fn, *args):
        return jax.tree.map(lambda x, like: x.astype(like.dtype), fn(*args), shapes)

    return [fns[0], *(functools.partial(cast, fn) for fn in fns[1:])]


def _possible_dtypes(name: str) -> tuple[str, ...]:
    """Returns the dtypes in the name of a `half_precision` function, if it is one's."""
    if not name.startswith(RESERVED_HALF):
        return ()
    dtypes = name.removeprefix(f"{RESERVED_HALF}_").split("_")[0]
    return tuple(filter(None, dtypes.split("-")))


def _function_name(name: str) -> str:
    return name.removeprefix(f"{RESERVED_HALF}_").partition("_")[2]


def _call(branch: Any, name: str, cond: Any) -> Any:
    """Returns a call of the branch of a conditional, in its place."""
    call = empty_call(len(cond.invars) - 1, len(cond.outvars))
    return call.replace(
        invars=cond.invars[1:],
        outvars=cond.outvars,
        params=call.params | {"jaxpr": branch, "name": name},
        source_info=cond.source_info,
        ctx=cond.ctx,
        effects=cond.effects,
    )
