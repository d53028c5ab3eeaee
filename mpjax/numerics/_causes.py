"""Why an operation gave Inf or NaN: its record, and the rules that tell."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax._jaxpr import core as _jaxpr

HALF_OVERFLOW = "overflow of half precision"
OVERFLOW = "overflow"
DIVISION_BY_ZERO = "division by zero"
LOG_OF_ZERO = "logarithm of zero"
OUT_OF_DOMAIN = "outside of the function's domain"
NAN_OF_INF = "NaN from Inf"
INPUT = "already in an input"
CONSTANT = "a constant of the function"
UNKNOWN = "unknown"

_REMEDIES = {
    HALF_OVERFLOW: "It is finite in float32: lower the loss scale if this is the "
    "backward pass, run the operation in float32, or use bfloat16.",
    OVERFLOW: "Subtract the maximum before exponentials, or clip what goes in.",
    DIVISION_BY_ZERO: "Make the denominator at least an epsilon that its dtype holds, "
    "or choose a safe one by jnp.where before dividing, not after.",
    LOG_OF_ZERO: "Work with log_softmax or log_sigmoid, or add an epsilon that the "
    "dtype holds inside the logarithm.",
    OUT_OF_DOMAIN: "Clip what goes in, or choose a safe value by jnp.where before the "
    "function, not after.",
    NAN_OF_INF: "An Inf met another, or a zero: mask by a large finite number instead "
    "of Inf, and leave no row masked whole.",
    INPUT: "Look at the data, or at the step that made the parameters.",
    CONSTANT: "The function returns a constant that is not finite.",
    UNKNOWN: "",
}

# Primitives that have a pole at zero: the position of the operand that makes it.
_POLES = {"div": 1, "rsqrt": 0, "log": 0, "log2": 0, "log1p": 0, "pow": 0, "rem": 1}
_LOGS = ("log", "log2", "log1p")
_DOMAINS = {
    "log": lambda x: x < 0,
    "log2": lambda x: x < 0,
    "log1p": lambda x: x < -1,
    "sqrt": lambda x: x < 0,
    "rsqrt": lambda x: x < 0,
    "asin": lambda x: np.abs(x) > 1,
    "acos": lambda x: np.abs(x) > 1,
    "acosh": lambda x: x < 1,
    "atanh": lambda x: np.abs(x) > 1,
    "erf_inv": lambda x: np.abs(x) > 1,
    "pow": lambda x: x < 0,
}


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """The first operation that gave Inf or NaN of what reached an output.

    Attributes:
      cause: "overflow of half precision" (finite in float32), "overflow", "division by
        zero", "logarithm of zero", "outside of the function's domain", "NaN from Inf"
        (Inf - Inf, 0 * Inf), "already in an input", "a constant of the function" or
        "unknown".
      primitive: name of the operation; empty for an input or constant.
      scope: its name scope.
      source: the user's source line, `model.py:12:4 (loss_fn)`.
      is_backward: whether it is of the backward pass. JAX takes some derivatives in
        the forward pass already: 1 / (2 sqrt(x)) is a `div` at the line of the root.
      dtype: of what it gave.
      shape: of what it gave.
      num_nan: how many NaN it gave.
      num_inf: how many Inf.
      index: where the first of them is.
      largest_input: the largest finite magnitude among its inputs; None without any.
      iterations: the iteration of each loop around it, the outermost first.
      leaf: path of the argument, `args[0]['w']`, if the cause is an input.
    """

    cause: str
    primitive: str
    scope: str
    source: str
    is_backward: bool
    dtype: str
    shape: tuple[int, ...]
    num_nan: int
    num_inf: int
    index: tuple[int, ...]
    largest_input: float | None
    iterations: tuple[int, ...] = ()
    leaf: str = ""

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return _REMEDIES[self.cause]

    def __str__(self) -> str:
        found = [f"{self.num_nan} NaN"] if self.num_nan else []
        found += [f"{self.num_inf} Inf"] if self.num_inf else []
        size = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        numbers = f"{' and '.join(found)} in {size}, the first at {self.index}"
        if self.cause == INPUT:
            return f"{numbers} of {self.leaf}: {self.cause}. {self.remedy}"
        where = f"{self.primitive or 'constant'}"
        where += f" in {self.scope}" if self.scope else ""
        where += f" at {self.source}" if self.source else ""
        where += ", backward pass" if self.is_backward else ""
        if self.iterations:
            where += f", iteration {'.'.join(map(str, self.iterations))}"
        largest = self.largest_input
        given = "" if largest is None else f"; largest finite input {largest:.4g}"
        return f"{self.cause}: {where} gave {numbers}{given}. {self.remedy}".rstrip()


def count(x: Any) -> tuple[int, int, tuple[int, ...]]:
    """Returns how many NaN and Inf an array has, and the index of the first."""
    flat = np.asarray(x)
    if flat.dtype.kind != "c":
        flat = flat.astype(np.promote_types(np.float32, _numpy_dtype(flat)))
    bad = ~np.isfinite(flat)
    index = np.unravel_index(int(bad.argmax()), bad.shape) if bad.any() else ()
    num_nan = int(np.isnan(flat).sum())
    return num_nan, int(bad.sum()) - num_nan, tuple(map(int, index))


def largest_finite(values: list[Any]) -> float | None:
    """Returns the largest finite magnitude among floating arrays."""
    found = []
    for x in values:
        if jnp.issubdtype(x.dtype, jnp.floating) and x.size:
            magnitude = np.abs(np.asarray(x).astype(np.float64))
            finite = magnitude[np.isfinite(magnitude)]
            found += [float(finite.max())] if finite.size else []
    return max(found, default=None)


def find_cause(eqn: Any, values: list[Any], outputs: list[Any]) -> str:
    """Returns why an equation gave Inf or NaN.

    Args:
      eqn: the equation.
      values: its inputs, none of which is to blame.
      outputs: what it gave.
    """
    num_nan = sum(count(x)[0] for x in outputs if is_inexact(x))
    name = eqn.primitive.name
    operand = _operand(eqn, values)
    leaves = _DOMAINS.get(name) if operand is not None and num_nan else None
    if leaves is not None and np.any(leaves(operand)):
        return OUT_OF_DOMAIN
    if any(not np.isfinite(_wide(x)).all() for x in values if is_inexact(x)):
        return NAN_OF_INF if num_nan else UNKNOWN
    at_pole = operand is not None and np.any(operand == (-1 if name == "log1p" else 0))
    if at_pole:
        return LOG_OF_ZERO if name in _LOGS else DIVISION_BY_ZERO
    if _is_half(outputs) and _is_finite_in_float32(eqn, values):
        return HALF_OVERFLOW
    return UNKNOWN if num_nan else OVERFLOW


def is_inexact(x: Any) -> bool:
    """Whether a value is an array of floating or complex numbers."""
    return jnp.issubdtype(getattr(x, "dtype", np.bool_), jnp.inexact)


def _operand(eqn: Any, values: list[Any]) -> Any:
    """The operand that makes a pole or leaves the domain, as float64."""
    name = eqn.primitive.name
    position = 0 if name == "integer_pow" else _POLES.get(name, 0)
    if name == "integer_pow" and eqn.params["y"] >= 0:
        return None
    if name not in (*_POLES, *_DOMAINS, "integer_pow"):
        return None
    return _wide(values[position]) if is_inexact(values[position]) else None


def _is_finite_in_float32(eqn: Any, values: list[Any]) -> bool:
    if eqn.primitive.name == "convert_element_type":
        return True  # Its input is finite.
    widened = [x.astype(jnp.float32) if _is_half([x]) else x for x in values]
    params = dict(eqn.params)
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = np.dtype(np.float32)
    try:
        outputs = _jaxpr.bind(eqn.replace(params=params), *widened)
    except Exception:  # A primitive that takes these dtypes only.
        return False
    return all(np.isfinite(_wide(x)).all() for x in outputs if is_inexact(x))


def _is_half(values: list[Any]) -> bool:
    return any(
        jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
        for x in values
    )


def _wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x if x.dtype.kind == "c" else x.astype(np.float64)


def _numpy_dtype(x: np.ndarray) -> Any:
    return x.dtype if x.dtype.kind == "f" else np.float32
