"""Taps: identities whose derivatives show cotangents to `probe`."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from mpjax._jaxpr.core import (
    Var,
    eval_jaxpr,
    is_inexact_aval,
    map_inner_jaxprs,
    open_jaxpr,
    with_equations,
)
from mpjax._jaxpr.flatten import (
    FlatFunction,
    Static,
    flatten,
    refuse_modules,
    unflatten,
)
from mpjax._jaxpr.primitives import MATMULS, Kind, facts_of
from mpjax._jaxpr.provenance import is_float8_matmul, join_scope

VALUE = "mpjax.tap.value:"
COTANGENT = "mpjax.tap.cotangent:"


def tap(fn: Callable[..., Any], *, ops: Collection[str] = ()) -> Callable[..., Any]:
    """Marks the output of every matmul and convolution, for `probe` to find.

    It takes the function and returns a function: `tap(fn)(*args)`.

    A mark is an identity whose derivative is an identity, and compiles to nothing. Put
    `tap` around the function that is differentiated, and `probe` around the whole; the
    histograms of cotangents then have the names of the forward operations.

    Matmuls inside a function with a custom derivative (`jax.custom_vjp`) are not
    marked: its rule decides what the backward pass computes, and `probe` counts this
    without a mark. Marks have no forward-mode derivative: no `jax.jvp`, `jax.jacfwd` or
    `jax.hessian`.

    Args:
      fn: any function of pytrees, under the contract of `jax.jit`.
      ops: names of further primitives to mark, such as "tanh".

    Returns:
      A function with the arguments and outputs of `fn`.

    Raises:
      TypeError: if `ops` is a string; when the returned function is called with an NNX
        module.
    """
    matched = matched_names(ops)

    def evaluate(spec: Static, arrays: list[Any]) -> tuple[list[Any], Static]:
        flat = FlatFunction(fn, spec)
        with jax.disable_jit(False):
            closed = jax.make_jaxpr(flat)(*arrays)
        tapped = _Tapper(matched).rewrite(closed, "")
        return eval_jaxpr(open_jaxpr(tapped), closed.consts, *arrays), flat.out_spec

    @functools.wraps(fn, updated=())
    def wrapper(*args, **kwargs):
        refuse_modules(fn, args, kwargs)
        arrays, spec = flatten((args, kwargs))
        return unflatten(*evaluate(spec, arrays))

    return wrapper


def matched_names(ops: Collection[str]) -> frozenset[str]:
    """Returns the names of the primitives to count: matmuls and `ops`.

    Raises:
      TypeError: if `ops` is one string, whose letters would match nothing.
    """
    if isinstance(ops, str):
        raise TypeError(
            f"ops={ops!r} must be a collection of names, not a string: ops=({ops!r},)."
        )
    return MATMULS | frozenset(ops)


class Names:
    """Makes names unique: numbers operations of the same scope and primitive."""

    def __init__(self):
        self._given: dict[str, int] = {}

    def new(self, base: str) -> str:
        """Returns `base`, or `base#2` the second time."""
        number = self._given[base] = self._given.get(base, 0) + 1
        return base if number == 1 else f"{base}#{number}"


def operation_name(scope: str, eqn: Any) -> str:
    """Returns the name of an operation: `encoder/Dense_0/dot_general`."""
    name = "dot_general" if is_float8_matmul(eqn) else eqn.primitive.name
    return f"{scope}/{name}" if scope else name


class _Tapper:
    def __init__(self, matched: frozenset[str]):
        self.matched = matched
        self.names = Names()

    def rewrite(self, jaxpr: Any, scope: str) -> Any:
        eqns = []
        for eqn in open_jaxpr(jaxpr).eqns:
            inner = join_scope(scope, eqn)
            # A custom derivative would never reach a mark inside.
            if facts_of(eqn).kind is not Kind.CUSTOM:
                rewrite = functools.partial(self.rewrite, scope=inner)
                eqn = eqn.replace(params=map_inner_jaxprs(rewrite, eqn.params))
            if eqn.primitive.name in self.matched:
                eqns += self._marked(eqn, inner)
            else:
                eqns.append(eqn)
        return with_equations(jaxpr, eqns=eqns)

    def _marked(self, eqn: Any, scope: str) -> list[Any]:
        outvars, marks = [], []
        for v in eqn.outvars:
            if not isinstance(v, Var) or not is_inexact_aval(v.aval):
                outvars.append(v)
                continue
            raw = Var(v.aval)
            name = self.names.new(operation_name(scope, eqn))
            with eqn.ctx.manager:
                traced = jax.make_jaxpr(_make_tap(name))(v.aval)
            (mark,) = open_jaxpr(traced).eqns
            marks.append(
                mark.replace(invars=[raw], outvars=[v], source_info=eqn.source_info)
            )
            outvars.append(raw)
        return [eqn.replace(outvars=outvars), *marks]


def _make_tap(name: str) -> Callable[[jax.Array], jax.Array]:
    def value(x):
        return checkpoint_name(x, VALUE + name)

    identity = jax.custom_vjp(value)
    identity.defvjp(
        lambda x: (value(x), None),
        lambda _, cotangent: (checkpoint_name(cotangent, COTANGENT + name),),
    )
    return identity
