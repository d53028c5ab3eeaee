"""Frozen dataclasses that are JAX pytrees and that flax can serialise.

`jax.tree_util.register_dataclass` rebuilds an object through its constructor, so a
constructor that validates would reject the placeholders JAX puts into leaves. Here
unflattening bypasses `__init__`, and validation stays where users call it.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax

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
            _register_with_flax(cls, data)
            node = object.__new__(cls)
            for name, value in zip(data + static, (*children, *meta), strict=True):
                object.__setattr__(node, name, value)
            return node

        jax.tree_util.register_pytree_with_keys(
            cls, flatten_with_keys, unflatten, flatten
        )
        init = cls.__init__

        def __init__(self, *args, **kwargs):
            _register_with_flax(cls, data)
            init(self, *args, **kwargs)

        cls.__init__ = __init__
        return cls

    return decorate


def replace_leaves(node: T, **leaves: Any) -> T:
    """Returns a copy of a pytree dataclass with other leaves, without validation."""
    new = object.__new__(type(node))
    new.__dict__.update(node.__dict__ | leaves)
    return new


_known_to_flax: set[type] = set()


def _register_with_flax(cls: type, data: tuple[str, ...]) -> None:
    """Registers `cls` with flax.serialization once flax is there; never imports it."""
    serialization: Any = sys.modules.get("flax.serialization")
    if cls in _known_to_flax or not hasattr(
        serialization, "register_serialization_state"
    ):
        return
    _known_to_flax.add(cls)

    def to_state_dict(node):
        return {
            name: serialization.to_state_dict(
                jax.tree.map(_key_to_data, getattr(node, name))
            )
            for name in data
        }

    def from_state_dict(node, state):
        leaves = {}
        for name in data:
            target = getattr(node, name)
            restored = serialization.from_state_dict(
                jax.tree.map(_key_to_data, target), state[name], name=name
            )
            leaves[name] = jax.tree.map(_data_to_key, target, restored)
        return replace_leaves(node, **leaves)

    serialization.register_serialization_state(cls, to_state_dict, from_state_dict)


def is_key(x: Any) -> bool:
    """Whether `x` is an array of typed PRNG keys (`jax.random.key`)."""
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(
        x.dtype, jax.dtypes.prng_key
    )


def _key_to_data(x):
    return jax.random.key_data(x) if is_key(x) else x


def _data_to_key(target, x):
    if is_key(target):
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(target))
    return x
