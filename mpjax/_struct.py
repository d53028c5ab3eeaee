"""Frozen dataclasses that are JAX pytrees and that flax can serialise.

`jax.tree_util.register_dataclass` rebuilds an object through its constructor, so a
constructor that validates would reject the placeholders JAX puts into leaves. Here
unflattening bypasses `__init__`, and validation stays where users call it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

from mpjax import _flax

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree_dataclass(*, static: tuple[str, ...] = ()) -> Callable[[type[T]], type[T]]:
    """Makes a class a frozen dataclass and a pytree.

    Args:
      static: names of the fields that belong to the tree's structure (hashable
        settings); every other field is a subtree of leaves.

    Returns:
      A class decorator.
    """

    def decorate(cls: type[T]) -> type[T]:
        cls = dataclasses.dataclass(frozen=True)(cls)
        names = tuple(field.name for field in dataclasses.fields(cls))  # pyright: ignore[reportArgumentType]
        data = tuple(name for name in names if name not in static)

        def flatten(node):
            return (
                tuple(getattr(node, name) for name in data),
                tuple(getattr(node, name) for name in static),
            )

        def flatten_with_keys(node):
            children, meta = flatten(node)
            keys = map(jax.tree_util.GetAttrKey, data)
            return tuple(zip(keys, children, strict=True)), meta

        def unflatten(meta, children):
            node = object.__new__(cls)
            for name, value in zip(data + static, (*children, *meta), strict=True):
                object.__setattr__(node, name, value)
            return node

        jax.tree_util.register_pytree_with_keys(
            cls, flatten_with_keys, unflatten, flatten
        )
        _flax.register(cls, data)
        return cls

    return decorate


def replace_leaves(node: T, **leaves: Any) -> T:
    """Returns a copy of a pytree dataclass with other leaves, without validation."""
    new = object.__new__(type(node))
    new.__dict__.update(node.__dict__ | leaves)
    return new


def set_field(node: Any, name: str, value: Any) -> None:
    """Sets a field of a frozen dataclass, for use in its `__post_init__`."""
    object.__setattr__(node, name, value)


def require(node: Any, name: str, what: str, holds: Callable[[Any], bool]) -> None:
    """Raises ValueError unless `holds` is true for the value of a field.

    Args:
      node: a dataclass.
      name: name of the field.
      what: what the value must be, for the message.
      holds: predicate on the value.
    """
    value = getattr(node, name)
    if not holds(value):
        raise ValueError(f"{name}={value!r} must be {what}.")


def is_count(x: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(x, (int, np.integer)) and x is not True and int(x) >= 1


def replace_fields(node: T, changes: dict[str, Any]) -> T:
    """Returns a copy of a pytree dataclass with other field values, not validated.

    Raises:
      TypeError: for a name that is not a field; the message lists the fields.
    """
    known = [field.name for field in dataclasses.fields(node)]  # pyright: ignore[reportArgumentType]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise TypeError(
            f"{type(node).__name__} has no field {', '.join(map(repr, unknown))}; its "
            f"fields are {', '.join(known)}."
        )
    return replace_leaves(node, **changes)
