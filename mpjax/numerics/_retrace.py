"""State whose dtypes differ between a function's arguments and its outputs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from mpjax._jaxpr.core import is_inexact_aval, open_jaxpr
from mpjax._jaxpr.flatten import Static
from mpjax.numerics._findings import RETRACE, Finding
from mpjax.numerics._flow import AbstractValue, Site


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """An array of the arguments or outputs, with its abstract value."""

    aval: Any
    value: AbstractValue | None = None


@dataclasses.dataclass(frozen=True)
class _Tree:
    """A tree that is never unflattened: its classes may refuse leaves like these."""

    treedef: Any
    leaves: list[_Leaf | None]

    def children(self) -> list["_Tree"]:
        found, start = [], 0
        for child in self.treedef.children():
            stop = start + child.num_leaves
            found.append(_Tree(child, self.leaves[start:stop]))
            start = stop
        return found


def find_retraces(
    args: tuple,
    jaxpr: Any,
    values: list[AbstractValue],
    in_spec: Static,
    out_spec: Static,
) -> list[Finding]:
    """Returns the leaves of a carried state that make jit trace the function again.

    A carried state is an output whose tree is that of the argument at the same
    position: `state` in `step(state, batch) -> (state, metrics)`. A single array or
    number never counts as one, because a learning rate and a loss may share a position.

    Args:
      args: positional arguments of the function.
      jaxpr: the function, traced.
      values: abstract values of its outputs.
      in_spec: what `flatten` returned for `(args, kwargs)`.
      out_spec: what `flatten` returned for the outputs.
    """
    body = open_jaxpr(jaxpr)
    inputs = _tree(in_spec, [_Leaf(v.aval) for v in body.invars])
    leaves = [_Leaf(v.aval, x) for v, x in zip(body.outvars, values, strict=True)]
    before, outputs = inputs.children()[0].children(), _tree(out_spec, leaves)
    found = []
    for i, after in _states(before, outputs):
        paths, _ = jax.tree_util.tree_flatten_with_path(args[i])
        pairs = [
            (f"args[{i}]{jax.tree_util.keystr(path)}", a, b)
            for (path, _), a, b in zip(
                paths, before[i].leaves, after.leaves, strict=True
            )
            if a is not None and b is not None
        ]
        # If no leaf keeps its dtype, it may be a gradient, or a cast of the whole tree.
        is_stepped = any(
            is_inexact_aval(a.aval) and _is_computed(b) and a.aval.dtype == b.aval.dtype
            for _, a, b in pairs
        )
        for path, a, b in pairs:
            if a.aval.shape == b.aval.shape:
                found += _compare(path, a, b, is_stepped)
    return found


def _tree(spec: Static, arrays: list[_Leaf]) -> _Tree:
    treedef, static = spec.value
    given = iter(arrays)
    return _Tree(treedef, [next(given) if s is None else None for s in static])


def _states(before: list[_Tree], outputs: _Tree) -> Iterator[tuple[int, _Tree]]:
    pairs = [(0, outputs)] if before else []
    node = outputs.treedef.node_data()
    if node is not None and node[0] in (tuple, list):
        pairs += enumerate(outputs.children()[: len(before)])
    for i, after in pairs:
        is_tree = after.treedef.node_data() is not None
        if is_tree and after.treedef == before[i].treedef:
            yield i, after


def _compare(path: str, a: _Leaf, b: _Leaf, is_stepped: bool) -> Iterator[Finding]:
    site = (b.value and b.value.site) or Site("output", "", "")
    dtype = str(b.aval.dtype)
    if a.aval.dtype != b.aval.dtype:
        if not is_stepped or not _is_computed(b):
            return
        message = f"{path} goes in as {a.aval.dtype} and comes out as {dtype}"
        remedy = "Cast it back at the end, new.astype(old.dtype)"
    elif a.aval.weak_type and not b.aval.weak_type:
        message = f"{path} goes in as a Python number (weakly typed) and comes out "
        message += f"as a {dtype} array"
        remedy = f"Start from an array, jnp.{dtype}(...)"
    elif b.aval.weak_type and not a.aval.weak_type:
        message = f"{path} goes in as a {dtype} array and comes out weakly typed, "
        message += "as a Python number"
        remedy = f"Set its dtype where it is made, jnp.asarray(x, jnp.{dtype})"
    else:
        return
    yield Finding(
        RETRACE,
        site.primitive,
        dtype,
        site.scope,
        site.source,
        message,
        f"{remedy}: otherwise jit traces and compiles again in the next step.",
    )


def _is_computed(leaf: _Leaf) -> bool:
    return leaf.value is not None and leaf.value.site is not None
