"""Arrays of one process, placed where several processes have devices."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from mpjax._tree import is_key


def place(x: Any, sharding: Sharding) -> jax.Array:
    """Places an array; where it spans processes, each passes the same whole array.

    An array that spans processes already may only change its sharding.
    """
    if sharding.is_fully_addressable or not is_local(x):
        return jax.device_put(x, sharding)
    value = host_value(jax.random.key_data(x) if is_key(x) else x)
    placed = jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
    if is_key(x):
        return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(x))
    return placed


def is_local(x: Any) -> bool:
    """Whether this process has all of an array, or it is none of JAX's."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def host_value(x: Any) -> np.ndarray:
    """Returns an array or a number as NumPy has it, in the dtype that JAX gives it."""
    x = np.asarray(x)
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
