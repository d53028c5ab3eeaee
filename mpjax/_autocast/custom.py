"""Rewrites functions with custom derivatives: both the function and its rule.

The contents of a `custom_vjp` or `custom_jvp` equation are private to JAX. Only its
`bind` is used: it evaluates and differentiates the equation as JAX would. A new
`custom_vjp` or `custom_jvp` is made around it, and traced; its rule is rewritten when
the function is differentiated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mpjax._jaxpr.core import (
    Literal,
    bind,
    dtype_of,
    eval_jaxpr,
    inner_jaxprs,
    open_jaxpr,
)


def trace(
    eqn: Any, evaluate: Callable[..., list[Any]], make_jaxpr: Callable[..., Any]
) -> Any:
    """Traces the rewritten form of a `custom_jvp_call` or `custom_vjp_call`.

    Args:
      eqn: the equation.
      evaluate: `(jaxpr, consts, *args) -> outputs`, which rewrites and evaluates.
      make_jaxpr: `(fn, *arrays) -> jaxpr`, which traces a derivative for `evaluate`.

    Returns:
      An open jaxpr with the equation's inputs and outputs as traced, or None if the
      rule cannot be traced by itself, such as one with a collective over the axes of
      a `shard_map` around it.
    """

    def call(*args):
        return bind(eqn, *args)

    def rewritten(fn):
        """`fn` with its operations rewritten; zeros and static leaves pass through."""

        def run(*args):
            leaves, treedef = jax.tree.flatten(args)
            is_traced = [_is_array(x) for x in leaves]
            out_treedef: Any = None

            def flat(*arrays):
                nonlocal out_treedef
                given = iter(arrays)
                merged = [
                    next(given) if traced else leaf
                    for traced, leaf in zip(is_traced, leaves, strict=True)
                ]
                outputs = fn(*jax.tree.unflatten(treedef, merged))
                outputs, out_treedef = jax.tree.flatten(outputs)
                return outputs

            arrays = [x for x, t in zip(leaves, is_traced, strict=True) if t]
            closed = make_jaxpr(flat, *arrays)
            outputs = evaluate(closed, closed.consts, *arrays)
            return jax.tree.unflatten(out_treedef, outputs)

        return run

    body = inner_jaxprs(eqn)[0]

    def primal(*args):
        return evaluate(body, getattr(body, "consts", ()), *args)

    if eqn.primitive.name == "custom_jvp_call":
        fn = jax.custom_jvp(primal)
        jvp = rewritten(lambda primals, tangents: _jvp(call, primals, tangents))
        fn.defjvp(
            lambda primals, tangents: jvp(tuple(primals), tuple(tangents)),
            symbolic_zeros=True,
        )
    else:
        fn = jax.custom_vjp(primal)
        vjp = rewritten(lambda perturbed, *args: _vjp(call, perturbed, args))
        pull_back = rewritten(lambda vjp, cotangents: vjp(cotangents))

        def forward(*args):
            perturbed = tuple(x.perturbed for x in args)
            return vjp(perturbed, *(x.value for x in args))

        def backward(vjp, cotangents):
            return pull_back(vjp, jax.tree.map(_instantiate, cotangents))

        fn.defvjp(forward, backward, symbolic_zeros=True)
    in_avals, out_avals = [x.aval for x in eqn.invars], [v.aval for v in eqn.outvars]
    return _trace(eqn, fn, in_avals, out_avals)


def trace_elementwise(
    eqn: Any, rewritten: Any, in_avals: list[Any], out_dtypes: tuple[Any, ...]
) -> Any:
    """Traces a `custom_jvp` function with a rewritten body and its rule in float32.

    Args:
      eqn: the equation.
      rewritten: its jaxpr, for inputs of `in_avals` and outputs of `out_dtypes`.
      in_avals: shape and dtype of each input.
      out_dtypes: dtype of each output.

    Returns:
      An open jaxpr, or None where it cannot be traced.
    """
    in_dtypes = [dtype_of(x) for x in eqn.invars]

    def primal(*args):
        return eval_jaxpr(
            open_jaxpr(rewritten), getattr(rewritten, "consts", ()), *args
        )

    def rule(primals, tangents):
        full = [tuple(map(_convert, x, in_dtypes)) for x in (primals, tangents)]
        out, tangent = jax.jvp(lambda *xs: bind(eqn, *xs), full[0], full[1])
        return [*map(_convert, out, out_dtypes)], [*map(_convert, tangent, out_dtypes)]

    fn = jax.custom_jvp(primal)
    fn.defjvp(rule)
    out_avals = [
        v.aval.update(dtype=dtype)
        for v, dtype in zip(eqn.outvars, out_dtypes, strict=True)
    ]
    return _trace(eqn, fn, in_avals, out_avals)


def _jvp(fn: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    """Returns `jax.jvp` with respect to those inputs alone that have a tangent."""
    perturbed = [not isinstance(x, SymbolicZero) for x in tangents]
    return jax.jvp(
        _of_some(fn, primals, perturbed),
        _chosen(primals, perturbed),
        _chosen(tangents, perturbed),
    )


def _vjp(fn: Callable[..., Any], perturbed: Any, args: Any) -> Any:
    """Returns `jax.vjp` with respect to the perturbed inputs alone.

    Args:
      fn: function of arrays.
      perturbed: booleans; whether each input is differentiated, as JAX says it.
      args: the inputs.

    Returns:
      The outputs, and a function from cotangents to one gradient per input, None for
      an input that is not differentiated.
    """
    outputs, vjp = jax.vjp(_of_some(fn, args, perturbed), *_chosen(args, perturbed))
    return outputs, jax.tree_util.Partial(_Expand(tuple(perturbed)), vjp)


class _Expand(NamedTuple):
    """Calls a vjp of some inputs, and gives the others None, which is zero."""

    perturbed: tuple[bool, ...]

    def __call__(self, vjp: Any, cotangents: Any) -> tuple[Any, ...]:
        found = iter(vjp(cotangents))
        return tuple(next(found) if x else None for x in self.perturbed)


def _of_some(fn: Callable[..., Any], args: Any, perturbed: Any) -> Callable[..., Any]:
    """Returns `fn` as a function of some of its arguments; the others are constants.

    So a rule is not asked for derivatives that nobody wants.
    """

    def call(*some):
        given = iter(some)
        pairs = zip(args, perturbed, strict=True)
        return fn(*(next(given) if is_perturbed else x for x, is_perturbed in pairs))

    return call


def _chosen(values: Any, perturbed: Any) -> tuple[Any, ...]:
    pairs = zip(values, perturbed, strict=True)
    return tuple(x for x, is_perturbed in pairs if is_perturbed)


def _instantiate(cotangent: Any) -> Any:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    aval: Any = cotangent.aval
    return jnp.zeros(aval.shape, aval.dtype)


def _trace(
    eqn: Any, fn: Callable[..., Any], in_avals: list[Any], out_avals: list[Any]
) -> Any:
    """Traces a function in the context of an equation, or returns None."""
    try:
        with eqn.ctx.manager:
            closed = jax.make_jaxpr(jax.jit(fn))(*in_avals)
    except Exception:  # The user's rule may raise anything when traced by itself.
        return None
    traced = open_jaxpr(closed)
    defined = {v for eqn in traced.eqns for v in eqn.outvars}
    outvars = traced.outvars
    fits = (
        not closed.consts
        and not any(isinstance(v, Literal) for v in outvars)
        and len(set(outvars)) == len(outvars)
        and defined.issuperset(outvars)
        and all(_same(v.aval, a) for v, a in zip(outvars, out_avals, strict=True))
    )
    return traced if fits else None


def _convert(x: Any, dtype: Any) -> Any:
    return x.astype(dtype) if _is_array(x) and x.dtype != dtype else x


def _same(new: Any, old: Any) -> bool:
    same = (new.shape, new.dtype) == (old.shape, old.dtype)
    return same and new.manual_axis_type == old.manual_axis_type


def _is_array(x: Any) -> bool:
    if isinstance(x, SymbolicZero):
        return False
    return getattr(x, "dtype", None) not in (None, jax.dtypes.float0)
