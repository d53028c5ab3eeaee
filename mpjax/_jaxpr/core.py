"""Jaxprs: reading, rebuilding and evaluating them. The only importer of jax.extend.

`jax.extend` promises no compatibility between versions of JAX; the differences between
the versions that mpjax supports are handled here and in `loops`. From JAX 0.11 on
a `ClosedJaxpr` *is* a `Jaxpr`, so `isinstance` never distinguishes the two.
"""

import collections
import contextlib
import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, eval_jaxpr
from jax.extend import core, source_info_util
from jax.extend.core import JaxprEqn as Eqn
from jax.extend.core import Literal, Var, check_jaxpr
from jax.sharding import AxisType, PartitionSpec

from mpjax._jaxpr.provenance import join_scope

_FLOAT32 = np.dtype(np.float32)

# The source line of an operation is the user's, not the line in `flatten` that calls
# every function.
source_info_util.register_exclusion(str(pathlib.Path(__file__).with_name("flatten.py")))

__all__ = ["Eqn", "Literal", "Var", "check_jaxpr", "eval_jaxpr"]


def open_jaxpr(jaxpr: Any) -> Any:
    """Returns a jaxpr, closed or open, as an open jaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def with_equations(jaxpr: Any, **changes: Any) -> Any:
    """Replaces `invars`, `outvars` or `eqns`; a closed jaxpr stays closed."""
    inner = open_jaxpr(jaxpr)
    changed = inner.replace(**changes)
    return changed if inner is jaxpr else jaxpr.replace(jaxpr=changed)


def is_jaxpr(x: Any) -> bool:
    """Whether an equation's parameter is a jaxpr, closed or open."""
    return hasattr(x, "eqns") and hasattr(open_jaxpr(x), "invars")


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Returns the jaxprs among the parameters of an equation."""
    found = []
    for value in eqn.params.values():
        if is_jaxpr(value):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(x for x in value if is_jaxpr(x))
    return found


def default_branch(eqn: Any) -> Any:
    """Returns the branch of a choice by platform that names none, or None.

    It says what is meant; the others say the same for a platform (see `_xla_cpu`).
    """
    platforms = eqn.params.get("branches_platforms")
    if platforms is None or None not in platforms:
        return None
    return eqn.params["branches"][platforms.index(None)]


def jaxprs_meant(eqn: Any) -> list[Any]:
    """Returns the jaxprs inside an equation, of a choice by platform the default."""
    branch = default_branch(eqn)
    return inner_jaxprs(eqn) if branch is None else [branch]


def map_inner_jaxprs(fn: Callable[[Any], Any], params: dict[str, Any]) -> dict:
    """Applies `fn` to each jaxpr among the parameters of an equation."""

    def convert(value):
        if is_jaxpr(value):
            return fn(value)
        if isinstance(value, (tuple, list)) and any(map(is_jaxpr, value)):
            new = [fn(x) if is_jaxpr(x) else x for x in value]
            is_named = hasattr(value, "_fields")
            return type(value)(*new) if is_named else type(value)(new)
        return value

    return {name: convert(value) for name, value in params.items()}


def new_var(aval: Any, dtype: Any) -> Var:
    """Returns a fresh variable like `aval`, with another dtype and no weak type."""
    return Var(_with_dtype(aval, np.dtype(dtype)))


@functools.lru_cache(maxsize=4096)
def _with_dtype(aval: Any, dtype: Any) -> Any:
    return aval.update(dtype=dtype, weak_type=False)


def literal(value: Any, dtype: Any) -> Literal:
    """Returns a scalar literal."""
    array = np.asarray(value, dtype)
    return Literal(array, ShapedArray((), array.dtype))


def convert_eqn(atom: Any, out: Var, like: Any) -> Eqn:
    """Returns an equation that casts `atom` to the dtype of `out`.

    Args:
      atom: variable or literal.
      out: variable.
      like: equation whose source line, name scope and context it takes.
    """
    aval: Any = out.aval
    params = {"new_dtype": aval.dtype, "weak_type": aval.weak_type, "sharding": None}
    return core.new_jaxpr_eqn(
        [atom],
        [out],
        jax.lax.convert_element_type_p,
        params,
        core.no_effects,
        like.source_info if like is not None else None,
        like.ctx if like is not None else None,
    )


def new_eqn(
    primitive: Any, atoms: list[Any], params: dict, *, like: Any, varies_as: Any
) -> Eqn:
    """Returns an equation of one output, whose variable is new.

    Args:
      primitive: one without effects.
      atoms: its operands, variables or literals.
      params: its parameters, hashable.
      like: equation whose source line, name scope and context it takes.
      varies_as: variable; the output varies over the same axes of a `shard_map`, which
        the primitive's own rule does not know.
    """
    avals = tuple(x.aval for x in atoms)
    aval = _infer(primitive, avals, tuple(params.items()), like.ctx)
    aval = aval.update(manual_axis_type=varies_as.aval.manual_axis_type)
    return core.new_jaxpr_eqn(
        atoms,
        [Var(aval)],
        primitive,
        params,
        core.no_effects,
        like.source_info,
        like.ctx,
    )


@functools.lru_cache(maxsize=4096)
def _infer(primitive: Any, avals: tuple, params: tuple, context: Any) -> Any:
    with context.manager:
        return primitive.abstract_eval(*avals, **dict(params))[0]


def broadcast_eqn(atom: Any, shape: tuple[int, ...], like: Any) -> Eqn:
    """Returns an equation that broadcasts `atom` to a shape by NumPy's rules.

    Args:
      atom: variable or literal.
      shape: the shape of the result.
      like: equation whose source line, name scope and context it takes.
    """
    first = len(shape) - len(atom.aval.shape)
    params = {
        "shape": shape,
        "broadcast_dimensions": tuple(range(first, len(shape))),
        "sharding": None,
    }
    return new_eqn(
        jax.lax.broadcast_in_dim_p, [atom], params, like=like, varies_as=atom
    )


def unit_axes_eqn(atom: Any, num_axes: int, like: Any) -> Eqn:
    """Returns an equation that adds axes of length 1 before the axes of `atom`."""
    return broadcast_eqn(atom, (1,) * num_axes + atom.aval.shape, like)


def bind(eqn: Any, *values: Any) -> list[Any]:
    """Evaluates one equation, whatever its primitive."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def context_of(eqn: Any) -> Iterator[None]:
    """Traces its block with an equation's source line, name scope and context."""
    info = eqn.source_info
    name_stack = source_info_util.current_name_stack() + info.name_stack
    with (
        source_info_util.user_context(info.traceback, name_stack=name_stack),
        eqn.ctx.manager,
    ):
        yield


def trace_call(fn: Callable[..., Any], avals: Any, context: Any) -> Eqn:
    """Returns the equation that calls a function, as traced in a context.

    Unlike one that `jax.make_jaxpr` traces on its own, it knows over which axes of
    a `shard_map` its values vary.

    Args:
      fn: jitted, or with a custom derivative.
      avals: the types of its arguments.
      context: of an equation, `eqn.ctx`.
    """
    mesh = context.cur_abstract_mesh
    if mesh is None or not mesh.manual_axes:
        with jax.disable_jit(False), context.manager:
            return open_jaxpr(jax.make_jaxpr(fn)(*avals)).eqns[0]
    axes = tuple(mesh.manual_axes)
    specs, structs = [], []
    for aval in avals:
        varying = tuple(sorted(aval.manual_axis_type.varying))
        shape = list(aval.shape)
        if varying:
            shape[0] *= math.prod(mesh.shape[name] for name in varying)
        specs.append(PartitionSpec(varying) if varying else PartitionSpec())
        structs.append(jax.ShapeDtypeStruct(tuple(shape), aval.dtype))
    is_checked = any(aval.manual_axis_type.varying for aval in avals)
    is_auto = dict.fromkeys(axes, AxisType.Auto)
    with (
        jax.disable_jit(False),
        jax.sharding.use_abstract_mesh(mesh.update_axis_types(is_auto)),
    ):
        local = jax.shard_map(
            lambda *args: jax.tree.map(lambda x: x[None], fn(*args)),
            in_specs=tuple(specs),
            out_specs=PartitionSpec(axes),
            axis_names=set(axes),
            check_vma=is_checked,
        )
        traced = jax.make_jaxpr(local)(*structs)
    (body,) = inner_jaxprs(open_jaxpr(traced).eqns[0])
    return open_jaxpr(body).eqns[0]


def call_eqn(
    fn: Callable[..., Any], invars: list[Any], outvars: list[Var], *, like: Any
) -> Eqn:
    """Returns the equation that calls a function.

    Args:
      fn: takes and returns arrays.
      invars: its operands.
      outvars: its results, which vary over the same axes of a `shard_map`.
      like: equation whose source line, name scope and context it takes.
    """
    with jax.disable_jit(False), context_of(like):
        traced = jax.make_jaxpr(jax.jit(fn))(*(x.aval for x in invars))
    (call,) = open_jaxpr(vary_as(traced, outvars[0].aval)).eqns
    return call.replace(invars=invars, outvars=outvars, source_info=like.source_info)


def vary_as(jaxpr: Any, aval: Any) -> Any:
    """Returns a jaxpr whose results vary over the axes of a `shard_map` as `aval` does.

    A jaxpr traced on its own does not know of these axes, even if its inputs do.
    """
    body, names = open_jaxpr(jaxpr), {}

    def typed(var):
        if not is_inexact_aval(var.aval):
            return var
        names[var] = Var(var.aval.update(manual_axis_type=aval.manual_axis_type))
        return names[var]

    eqns = [
        eqn.replace(
            invars=renamed(eqn.invars, names),
            outvars=list(map(typed, eqn.outvars)),
            params=map_inner_jaxprs(lambda inner: vary_as(inner, aval), eqn.params),
        )
        for eqn in body.eqns
    ]
    return with_equations(jaxpr, eqns=eqns, outvars=renamed(body.outvars, names))


def from_source_of(eqn: Any, jaxpr: Any) -> Any:
    """Returns a jaxpr whose equations, at any depth, have the source line of `eqn`."""
    info = eqn.source_info.replace(name_stack=source_info_util.new_name_stack())
    eqns = [
        each.replace(
            source_info=info,
            params=map_inner_jaxprs(lambda x: from_source_of(eqn, x), each.params),
        )
        for each in open_jaxpr(jaxpr).eqns
    ]
    return with_equations(jaxpr, eqns=eqns)


def as_inside(call: Any, eqn: Any) -> Any:
    """Returns an equation of a called function as an equation of the caller.

    The name scope of the call, without the function's name, goes before its own.
    """
    name_stack = call.source_info.name_stack + eqn.source_info.name_stack
    return eqn.replace(source_info=eqn.source_info.replace(name_stack=name_stack))


def consts_as_inputs(closed: Any) -> Any:
    """Returns a closed jaxpr as an open one whose first inputs are its constants."""
    jaxpr = open_jaxpr(closed)
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])


def walk(jaxpr: Any, scope: str = "", times: int = 1) -> Iterator[tuple[Any, str, int]]:
    """Yields every equation, at any depth, before the equations inside it.

    Yields:
      `(eqn, scope, times)`: the name scope from the outermost jaxpr on, and how often
      the equation runs. The body of a `while` counts once; so does each branch of
      a `cond`.
    """
    for eqn in open_jaxpr(jaxpr).eqns:
        inner = join_scope(scope, eqn)
        yield eqn, inner, times
        for sub in jaxprs_meant(eqn):
            yield from walk(sub, inner, times * num_trips(eqn))


def num_trips(eqn: Any) -> int:
    """Returns how often the jaxprs inside an equation run; 1 if that is unknown."""
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def may_change_operands(eqn: Any) -> bool:
    """Whether operands may be added or removed: no effect names one by its index."""
    return not any(hasattr(effect, "input_index") for effect in eqn.effects)


def stacked_aval(aval: Any, length: int) -> Any:
    """Returns the type of `length` values of a type, stacked along a new first axis."""
    sharding = aval.sharding.update(spec=(None, *aval.sharding.spec))
    return aval.update(shape=(length, *aval.shape), weak_type=False, sharding=sharding)


def is_split(atom: Any) -> bool:
    """Whether an atom is sharded over the axes of an explicit mesh."""
    return any(axis is not None for axis in atom.aval.sharding.spec)


def has_effects(eqn: Any) -> bool:
    """Whether an equation has side effects; a collective has none."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def is_annotated(eqn: Any) -> bool:
    """Whether its context says where to run it, or gives the compiler metadata."""
    context = eqn.ctx
    names = ("compute_type", "xla_metadata")
    return any(getattr(context, name, None) for name in names)


def is_var(atom: Any) -> bool:
    """Whether an atom is a variable, not a literal."""
    return not isinstance(atom, Literal)


class MadeHalf(dict):
    """Parameters of a matmul, convolution or sum that autocast made half.

    They survive `eqn.replace`, so that later passes know what is autocast's own; what
    the user wrote in half stays as it is.
    """


class MadeFloat8(MadeHalf):
    """Parameters of a half matmul that a later pass of autocast makes float8.

    Attributes:
      all_sizes: whether its derivatives are float8 even where that does not pay.
    """

    def __init__(self, params: Any, *, all_sizes: bool):
        super().__init__(params)
        self.all_sizes = all_sizes


def count_uses(jaxpr: Any) -> collections.Counter[Var]:
    """Returns how often equations read each variable, or the jaxpr returns it."""
    body = open_jaxpr(jaxpr)
    atoms = [x for eqn in body.eqns for x in eqn.invars] + list(body.outvars)
    return collections.Counter(x for x in atoms if is_var(x))


def renamed(atoms: Any, names: dict[Var, Any]) -> list[Any]:
    """Returns atoms, with those variables replaced that `names` has a name for."""
    return [names.get(x, x) if is_var(x) else x for x in atoms]


def dtype_of(atom: Any) -> Any:
    """Returns the dtype of a variable or literal; None for a token."""
    return getattr(atom.aval, "dtype", None)


def num_bytes(atom: Any) -> int:
    """Returns the bytes of a variable or literal; 0 for a token.

    If a dimension is symbolic, the result is not an `int`.
    """
    dtype = dtype_of(atom)
    return math.prod(atom.aval.shape) * getattr(dtype, "itemsize", 0) if dtype else 0


def source_line(eqn: Any) -> str:
    """Returns the user's source line of an equation, `file.py:12 (function)`."""
    return source_info_util.summarize(eqn.source_info)


def canonical_precision(precision: Any) -> Any:
    """Returns `precision` as the pair that a matmul equation carries, or None."""
    if precision is None or isinstance(precision, tuple):
        return precision
    if isinstance(precision, str):
        try:
            precision = jax.lax.Precision(precision)
        except ValueError:
            return jax.lax.DotAlgorithmPreset[precision]
    if isinstance(precision, jax.lax.Precision):
        return (precision, precision)
    return precision


def is_float32(aval: Any) -> bool:
    """Whether a value was traced as float32."""
    return getattr(aval, "dtype", None) == _FLOAT32


def is_inexact_aval(aval: Any) -> bool:
    """Whether a value was traced as a floating or complex number."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and _is_inexact(dtype)


@functools.cache
def _is_inexact(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)
