"""Passes over jaxprs: one jaxpr in, one with the same inputs and outputs out."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from mpjax._jaxpr.core import (
    eval_jaxpr,
    inner_jaxprs,
    map_inner_jaxprs,
    open_jaxpr,
    with_equations,
)
from mpjax._jaxpr.primitives import Kind, facts_of


def apply_passes(fn: Callable[..., Any], *passes: Callable[[Any], Any]) -> Callable:
    """Returns a function of arrays whose jaxpr goes through passes when it is called.

    Under `jax.disable_jit` it is the function itself, which then sees concrete values.

    Args:
      fn: takes and returns pytrees of arrays.
      passes: each gets a closed jaxpr and returns one with the same inputs and outputs.
    """

    config: Any = jax.config

    @functools.wraps(fn, updated=())
    def call(*args):
        if config.jax_disable_jit:
            return fn(*args)
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        jaxpr = closed
        for run in passes:
            jaxpr = run(jaxpr)
        leaves = eval_jaxpr(open_jaxpr(jaxpr), closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return call


def map_equations(fn: Callable[[Any], list[Any]], jaxpr: Any) -> Any:
    """Replaces each equation by others, at any depth, the inner ones first.

    Args:
      fn: gets an equation and returns the equations that compute its results; a list of
        this equation alone leaves it as it is.
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """

    def convert(jaxpr):
        old = open_jaxpr(jaxpr).eqns
        new = [fn(eqn) for eqn in old]
        if all(len(x) == 1 and x[0] is eqn for x, eqn in zip(new, old, strict=True)):
            return jaxpr
        return with_equations(jaxpr, eqns=[eqn for eqns in new for eqn in eqns])

    return map_jaxprs(convert, jaxpr)


def map_jaxprs(fn: Callable[[Any], Any], jaxpr: Any) -> Any:
    """Applies `fn` once to a jaxpr and to each jaxpr inside it, the inner ones first.

    It enters calls, conditionals, loops and functions with custom derivatives. It does
    not enter kernels and unknown primitives.

    Args:
      fn: gets a jaxpr, closed or open, and returns one with the same inputs and
        outputs; the same object to leave it as it is.
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """
    done: dict[int, tuple[Any, Any]] = {}

    def convert(old):
        if id(old) not in done:
            eqns = [inside(eqn) for eqn in open_jaxpr(old).eqns]
            pairs = zip(eqns, open_jaxpr(old).eqns, strict=True)
            is_same = all(new is eqn for new, eqn in pairs)
            new = fn(old if is_same else with_equations(old, eqns=eqns))
            done[id(old)] = (old, new)
        return done[id(old)][1]

    def inside(eqn):
        if facts_of(eqn).kind not in ENTERED:
            return eqn
        if all(convert(inner) is inner for inner in inner_jaxprs(eqn)):
            return eqn
        return eqn.replace(params=map_inner_jaxprs(convert, eqn.params))

    return convert(jaxpr)


ENTERED = (
    Kind.CALL,
    Kind.CALL_AS_TRACED,
    Kind.COND,
    Kind.LOOP,
    Kind.CUSTOM,
)
