"""Leaves of parameters and gradients: predicates, casts, sums and selection."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_inexact(x: Any) -> bool:
    """Whether a leaf is a float or complex number or array (not int, bool or key)."""
    if isinstance(x, (float, complex)):
        return True
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def is_floating(x: Any) -> bool:
    """Whether an array, an abstract value or a dtype is real and floating."""
    dtype = _dtype_of(x)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def is_key(x: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys (`jax.random.key`)."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_half(x: Any) -> bool:
    """Whether an array, an abstract value or a dtype is narrower than float32.

    float16, bfloat16 and the float8 formats are; integers and tokens are not.
    """
    return is_floating(x) and jnp.finfo(_dtype_of(x)).bits < 32


def to_full(x: Any) -> Any:
    """Casts a half-precision leaf to float32; any other leaf passes through."""
    return x.astype(jnp.float32) if is_half(x) else x


def float0_to_zeros(grad: Any) -> Any:
    """Gives an integer parameter, whose gradient is float0, a zero float32 gradient."""
    if getattr(grad, "dtype", None) == jax.dtypes.float0:
        return jnp.zeros(grad.shape, jnp.float32)
    return grad


def sum_of_squares(tree: Any) -> jax.Array:
    """Returns the sum of |x|^2 over the inexact leaves, float32 at least; 0 if none.

    Each leaf has a name scope, by which `squared_leaf` knows its path.
    """
    total = jnp.zeros(())
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if is_inexact(x):
            with jax.named_scope(f"sum_of_squares[{path_name(path)}]"):
                x = to_full(jnp.asarray(x))
                squares = jnp.sum((x * x.conj()).real)
            total += squares
    return total


def squared_leaf(scope: str) -> str | None:
    """Returns the path of the leaf that `sum_of_squares` squares in a name scope."""
    found = re.search(r"sum_of_squares\[(.*)\]", scope)
    return found and found[1]


def path_name(key_path: tuple[Any, ...]) -> str:
    """Returns a pytree key path as `Dense_2/kernel`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def multiply(tree: Any, factor: Any) -> Any:
    """Multiplies the inexact leaves of a tree by a number, in float32 at least.

    A weakly typed float64 leaf stays float64, whatever the dtype of the factor.
    """

    def times(x):
        if not is_inexact(x):
            return x
        if hasattr(x, "dtype"):
            x = jax.lax.convert_element_type(x, x.dtype)
        return to_full(x) * factor

    return jax.tree.map(times, tree)


def int_array(value: Any) -> Any:
    """Returns `value` as an int32 scalar; a number becomes a NumPy array."""
    if isinstance(value, jax.Array):
        return jax.lax.convert_element_type(value, np.int32)
    return np.asarray(value, np.int32)


def select(pred: jax.Array, new: Any, old: Any) -> Any:
    """Returns the tree `new` if `pred`, else `old`; the dtypes are those of `old`.

    Leaves are selected, not multiplied by a mask: NaN times zero is NaN.
    """

    def choose(new, old):
        if not hasattr(old, "dtype") or is_key(old):
            return jnp.where(pred, new, old)
        return jnp.where(pred, jnp.asarray(new, old.dtype), jnp.asarray(old, old.dtype))

    return jax.tree.map(choose, new, old)


def _dtype_of(x: Any) -> Any:
    return x if isinstance(x, (type, np.dtype)) else getattr(x, "dtype", None)


def refuse_deleted(tree: Any, error: Exception | None = None) -> None:
    """Raises ValueError if an array of a tree was given to a step that reused it."""

    def is_deleted(x):
        is_array = isinstance(x, jax.Array) and not isinstance(x, Tracer)
        return is_array and x.is_deleted()

    if any(map(is_deleted, jax.tree.leaves(tree))):
        raise ValueError(
            "this state was given to a step before, which reused its memory (donation):"
            " go on with the state that the step returned, state, metrics = "
            "train_step(state, batch), or keep old states readable with "
            "make_train_step(..., donate=False)."
        ) from error
