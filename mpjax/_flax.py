"""Makes mpjax's dataclasses known to flax.serialization, without importing flax."""

import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._tree import is_key

_MODULE = "flax.serialization"
_waiting: list[tuple[type, tuple[str, ...]]] = []


def register(cls: type, data: tuple[str, ...]) -> None:
    """Registers a dataclass, now or as soon as flax.serialization is imported.

    Args:
      cls: a dataclass that is a pytree.
      data: names of the fields that hold leaves; the others are those of the target
        when a state is restored.
    """
    serialization: Any = sys.modules.get(_MODULE)
    if hasattr(serialization, "register_serialization_state"):
        _register(serialization, cls, data)
        return
    _waiting.append((cls, data))
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds flax.serialization as Python does, and registers what waits for it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        del path, target
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                for cls, data in _waiting:
                    _register(module, cls, data)
                _waiting.clear()

            spec.loader.exec_module = exec_module
        return spec


def _register(serialization: Any, cls: type, data: tuple[str, ...]) -> None:
    def to_state_dict(node):
        return {
            name: serialization.to_state_dict(
                jax.tree.map(_key_to_data, getattr(node, name))
            )
            for name in data
        }

    def from_state_dict(node, state):
        if set(state) != set(data):
            raise ValueError(
                f"a {cls.__name__} has {', '.join(data) or 'no fields'}, and what is "
                f"restored has {', '.join(state) or 'none'}: restore into a state of "
                "the kind that was saved, then replace what should change."
            )
        leaves = {}
        for name in data:
            target = getattr(node, name)
            restored = serialization.from_state_dict(
                jax.tree.map(_key_to_data, target), state[name], name=name
            )
            leaves[name] = jax.tree.map(_data_to_key, target, restored)
        new = object.__new__(cls)
        new.__dict__.update(node.__dict__ | leaves)
        return new

    serialization.register_serialization_state(cls, to_state_dict, from_state_dict)


def _key_to_data(x: Any) -> Any:
    return jax.random.key_data(x) if is_key(x) else x


def _data_to_key(target: Any, x: Any) -> Any:
    dtype = getattr(target, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return x
    # A target from jax.eval_shape has a dtype alone, which the default must give.
    impl = jax.random.key_impl(target) if is_key(target) else None
    key = jax.random.wrap_key_data(x, impl=impl)
    if key.dtype != dtype:
        raise ValueError(
            f"expected a key of type {dtype}, got {key.dtype}: restore into a state "
            "that TrainState.create made, not into shapes."
        )
    return key
