"""Which parameters are trained: the others are neither differentiated nor updated."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from mpjax._tree import is_inexact, path_name

Trainable = str | Callable[[str], bool]


def find_trainable(params: Any, trainable: Trainable | None) -> tuple[bool, ...] | None:
    """Returns, for each leaf of `params`, whether it is trained; None if all are.

    Args:
      params: the parameters.
      trainable: a regular expression that is searched in the path of a parameter
        (`Dense_2/kernel`), or a predicate on that path; None for all.

    Raises:
      ValueError: if it selects no parameter, or is no regular expression.
      TypeError: if it is of another type.
    """
    if trainable is None:
        return None
    if isinstance(trainable, str):
        try:
            pattern = re.compile(trainable)
        except re.error as error:
            raise ValueError(
                f"trainable={trainable!r} is not a regular expression: {error}."
            ) from error
        is_trained: Callable[[str], Any] = pattern.search
    elif callable(trainable):
        is_trained = trainable
    else:
        raise TypeError(
            "trainable must be a regular expression or a function of a parameter's "
            f"path, got {trainable!r}."
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [path_name(path) for path, _ in leaves]
    chosen = tuple(bool(is_trained(name)) for name in names)
    if not any(c and is_inexact(x) for c, (_, x) in zip(chosen, leaves, strict=True)):
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(
            f"trainable={trainable!r} selects no parameter; their paths are {shown}."
        )
    return chosen


def split_params(params: Any, trainable: tuple[bool, ...] | None) -> tuple[Any, Any]:
    """Returns the trained and the frozen parameters.

    Both trees look like `params`, with `optax.MaskedNode()`, which has no leaves, where
    a parameter is in the other tree. Without `trainable` the second is None.

    Raises:
      ValueError: if `trainable` was made for other parameters.
    """
    if trainable is None:
        return params, None
    leaves, structure = jax.tree.flatten(params)
    if len(leaves) != len(trainable):
        raise ValueError(
            f"the state was created with trainable= for {len(trainable)} parameters, "
            f"but holds {len(leaves)}; create a new one with TrainState.create."
        )
    chosen = list(zip(leaves, trainable, strict=True))
    empty = optax.MaskedNode()
    trained = [x if is_trained else empty for x, is_trained in chosen]
    frozen = [empty if is_trained else x for x, is_trained in chosen]
    return structure.unflatten(trained), structure.unflatten(frozen)


def merge_params(trained: Any, frozen: Any) -> Any:
    """Returns the tree that `split_params` was given."""
    if frozen is None:
        return trained
    return jax.tree.map(
        lambda t, f: f if _is_empty(t) else t, trained, frozen, is_leaf=_is_empty
    )


def _is_empty(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
