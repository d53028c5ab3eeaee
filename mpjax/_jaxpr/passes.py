"""Passes over jaxprs: one jaxpr in, one with the same inputs and outputs out."""

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


def through(fn: Callable[..., Any], *passes: Callable[[Any], Any]) -> Callable:
    """Returns a function of arrays whose jaxpr goes through passes when it is called.

    Under `jax.disable_jit` it is the function itself, which then sees values.

    Args:
      fn: takes and returns pytrees of arrays.
      passes: each gets a closed jaxpr and returns one with the same inputs and outputs.
    """

    config: Any = jax.config

    def call(*args):
        if config.jax_disable_jit:
            return fn(*args)
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        jaxpr = closed
        for each in passes:
            jaxpr = each(jaxpr)
        leaves = eval_jaxpr(open_jaxpr(jaxpr), closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return call


def map_equations(fn: Callable[[Any], list[Any]], jaxpr: Any) -> Any:
    """Puts other equations in the place of each, at any depth, the inner ones first.

    Args:
      fn: gets an equation and returns those that give its results; itself alone to
        leave it as it is, and more than one otherwise.
      jaxpr: closed or open.

    Returns:
      The jaxpr; the very object if nothing changed.
    """

    def convert(jaxpr):
        old = open_jaxpr(jaxpr).eqns
        eqns = [new for eqn in old for new in fn(eqn)]
        return jaxpr if len(eqns) == len(old) else with_equations(jaxpr, eqns=eqns)

    return map_jaxprs(convert, jaxpr)


def map_jaxprs(fn: Callable[[Any], Any], jaxpr: Any) -> Any:
    """Applies `fn` to a jaxpr and to each inside it, those first, and each once.

    Args:
      fn: gets a jaxpr, closed or open, and returns one with the same inputs and
        outputs; the very object to leave it as it is.
      jaxpr: closed or open.

    Returns:
      The jaxpr; the very object if nothing changed.
    """
    done: dict[int, tuple[Any, Any]] = {}

    def convert(old):
        if id(old) not in done:
            eqns = [inside(eqn) for eqn in open_jaxpr(old).eqns]
            pairs = zip(eqns, open_jaxpr(old).eqns, strict=True)
            is_same = all(new is eqn for new, eqn in pairs)
            done[id(old)] = (
                old,
                fn(old if is_same else with_equations(old, eqns=eqns)),
            )
        return done[id(old)][1]

    def inside(eqn):
        if all(convert(inner) is inner for inner in inner_jaxprs(eqn)):
            return eqn
        return eqn.replace(params=map_inner_jaxprs(convert, eqn.params))

    return convert(jaxpr)
