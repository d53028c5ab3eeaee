"""What a value is, in the words of a message."""

from typing import Any


def describe(x: Any) -> str:
    """Returns in some words what a value is: a dtype and shape, a tuple of what."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype}{list(x.shape)}"
    if x is None or isinstance(x, (bool, int, float, complex, str)):
        return repr(x)
    if isinstance(x, dict):
        return f"a dictionary with the keys {', '.join(map(repr, x)) or 'none'}"
    if type(x) in (tuple, list):
        inner = ", ".join(map(describe, x[:4])) + (", ..." if len(x) > 4 else "")
        return f"a {type(x).__name__} of {len(x)}: ({inner})"
    if callable(x) and hasattr(x, "__name__"):
        return f"the function {x.__name__}"
    return f"an object of type {type(x).__name__}"


def is_array(x: Any) -> bool:
    """Whether it is an array, a number, or what JAX takes for one."""
    is_number = isinstance(x, (bool, int, float, complex))
    return is_number or hasattr(x, "dtype") or hasattr(x, "__jax_array__")
