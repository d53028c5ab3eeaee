"""Turns any function into a function of a list of arrays, as `jax.jit` does.

Leaves that are not arrays (strings, activation functions in a module) are static: part
of the function, not of its arguments.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_NUMBERS = (bool, int, float, complex)


@jax.tree_util.register_pytree_node_class
class Static:
    """A value that is part of a tree's structure; compared by value where possible.

    A value that can change in place is compared as it was, so that a change is noticed.
    """

    def __init__(self, value: Any):
        self.value = value
        self._snapshot = _snapshot(value)

    def tree_flatten(self) -> tuple[tuple, "Static"]:
        return (), self

    @classmethod
    def tree_unflatten(cls, aux: "Static", _: Any) -> "Static":
        return aux

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static):
            return False
        same = self._snapshot is other._snapshot
        return same or _equal(self._snapshot, other._snapshot)

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:
            return hash(type(self.value))


def _snapshot(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        try:
            return copy.deepcopy(value)
        except Exception:  # It equals nothing then, so every call is traced anew.
            return object()
    return value


def _equal(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # An `==` may not be a comparison: the values count as different.
        return False


def flatten(tree: Any, *, are_numbers_static: bool = False) -> tuple[list[Any], Static]:
    """Splits a tree into its arrays and numbers, and everything else about it.

    Args:
      tree: any pytree.
      are_numbers_static: whether Python's numbers belong to everything else.

    Returns:
      The arrays, and what `unflatten` needs to put them back.
    """
    leaves, treedef = jax.tree.flatten(tree)
    is_static = [
        not _is_dynamic(x) or (are_numbers_static and isinstance(x, _NUMBERS))
        for x in leaves
    ]
    arrays = [x for x, static in zip(leaves, is_static, strict=True) if not static]
    static = tuple(
        Static(x) if static else None
        for x, static in zip(leaves, is_static, strict=True)
    )
    return arrays, Static((treedef, static))


def unflatten(arrays: Any, spec: Static) -> Any:
    """Puts arrays back where `flatten` found them."""
    treedef, static = spec.value
    given = iter(arrays)
    leaves = [next(given) if s is None else s.value for s in static]
    return jax.tree.unflatten(treedef, leaves)


class FlatFunction:
    """A function of arrays that returns a list of arrays.

    Attributes:
      out_spec: what `unflatten` needs for the outputs; set by a call.
    """

    def __init__(self, fn: Callable[..., Any], spec: Static):
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.fn = fn
        self.spec = spec
        self.out_spec: Any = None

    def __call__(self, *arrays: Any) -> list[Any]:
        args, kwargs = unflatten(arrays, self.spec)
        outputs, self.out_spec = flatten(self.fn(*args, **kwargs))
        return outputs


def refuse_uncallable(fn: Any, name: str) -> None:
    """Raises TypeError if `fn`, the first argument of `name`, is no function."""
    if not callable(fn):
        raise TypeError(
            f"{name} takes the function first, {name}(fn, ...), and got {fn!r}. As "
            f"a decorator with arguments: @functools.partial({name}, ...)."
        )


def refuse_modules(fn: Any, args: Any, kwargs: Any) -> None:
    """Raises TypeError if a Flax NNX module is among the arguments.

    It would be copied, and its updates (BatchNorm statistics, random counters) lost.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    leaves = jax.tree_util.tree_leaves_with_path(
        (args, kwargs), is_leaf=lambda x: isinstance(x, nnx.Pytree)
    )
    for path, leaf in leaves:
        if isinstance(leaf, nnx.Pytree):
            where = jax.tree_util.keystr(path[1:])
            raise TypeError(
                f"expected arrays, got the NNX object {type(leaf).__name__} as argument"
                f" {where} of {getattr(fn, '__name__', fn)}: a traced function sees "
                "a copy, and its updates (BatchNorm statistics, random counters) would "
                "be lost. Split it outside, graphdef, state = nnx.split(model), pass "
                "the state, and inside call model = nnx.merge(graphdef, state, "
                "copy=True); return nnx.state(model) for what changed."
            )


def _is_dynamic(x: Any) -> bool:
    if isinstance(x, _NUMBERS):
        return True
    dtype = getattr(x, "dtype", None)
    if dtype is None or dtype == jax.dtypes.float0 or not hasattr(x, "shape"):
        return hasattr(x, "__jax_array__")
    if isinstance(x, (np.ndarray, np.generic)):
        return dtype.kind not in "OSUMm" and dtype.type is not np.void
    return True
