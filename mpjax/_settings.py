"""Settings of loss scales: numbers checked, and stored with their dtype."""

import re
from typing import Any

import jax
import jax.core
import numpy as np

from mpjax._tree import is_inexact, to_full

# The reciprocal of a larger float32 is subnormal, and flushed to zero by most devices.
LARGEST_LOSS_SCALE = 2.0**126


def multiply(tree: Any, factor: Any) -> Any:
    """Multiplies the inexact leaves of a tree, in float32 at least."""
    return jax.tree.map(lambda x: to_full(x) * factor if is_inexact(x) else x, tree)


def scale_array(value: Any, low: float = 0.0, high: float = LARGEST_LOSS_SCALE) -> Any:
    """Returns `value` as a strongly typed float32 scalar, checked where it is known.

    A number becomes a NumPy array, so that building a loss scale starts no backend.
    """
    if isinstance(value, jax.core.Tracer):
        return jax.lax.convert_element_type(value, np.float32)
    number = np.asarray(value, np.float64)
    if number.shape != () or not 0 < number <= high or number < low:
        raise ValueError(
            f"loss_scale={value} must be a positive number in [{low:g}, {high:g}]; "
            "choose another, or widen min_loss_scale and max_loss_scale."
        )
    if isinstance(value, jax.Array):
        return jax.lax.convert_element_type(value, np.float32)
    return number.astype(np.float32)


def int_array(value: Any) -> Any:
    """Returns `value` as an int32 scalar."""
    if isinstance(value, jax.Array):
        return jax.lax.convert_element_type(value, np.int32)
    return np.asarray(value, np.int32)


def is_count(x: Any) -> bool:
    """Whether something is a whole number of at least 1."""
    return isinstance(x, (int, np.integer)) and x is not True and int(x) >= 1


def require(node: Any, name: str, what: str, holds: Any) -> None:
    """Raises ValueError unless a field's value `holds`."""
    value = getattr(node, name)
    if not holds(value):
        raise ValueError(f"{name}={value!r} must be {what}.")


def set_field(node: Any, name: str, value: Any) -> None:
    """Sets a field of a frozen dataclass, while it is made."""
    object.__setattr__(node, name, value)


def parse_number(text: str) -> int | float:
    """Reads a number, or a power such as 2**15 or 2^15.

    Raises:
      ValueError: if it is neither.
    """
    power = re.fullmatch(r"(\d+)(?:\*\*|\^)(-?\d+)", text)
    if power:
        base, exponent = map(int, power.groups())
        if base > 10 or abs(exponent) > 150:
            raise ValueError(f"{text!r} is out of range")
        return base**exponent
    number = float(text)
    return int(number) if number.is_integer() else number
