"""Why an operation gave Inf or NaN: the record, and the rules that find the cause."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax._jaxpr import core as _jaxpr
from mpjax._jaxpr import primitives
from mpjax._tree import is_floating, is_half, is_inexact

HALF_OVERFLOW = "overflow of half precision"
OVERFLOW = "overflow"
DIVISION_BY_ZERO = "division by zero"
LOG_OF_ZERO = "logarithm of zero"
OUT_OF_DOMAIN = "outside of the function's domain"
NAN_OF_INF = "NaN from Inf"
CANCELLATION = "difference of half results"
SINGULAR = "singular matrix"
NOT_POSITIVE = "matrix that is not positive definite"
CONSTANT_CAST = "constant that a cast turned to Inf"
INPUT = "already in an input"
CONSTANT = "a constant of the function"
UNKNOWN = "unknown"

_REMEDIES = {
    HALF_OVERFLOW: "It is finite in float32: run the operation in float32, scale its "
    "input, or use bfloat16; the loss scale does not matter in the forward pass.",
    OVERFLOW: "Subtract the maximum before exponentials, or clip the operand.",
    DIVISION_BY_ZERO: "Keep the denominator above an epsilon that its dtype can hold, "
    "or choose a safe denominator by jnp.where before the division, not after it.",
    LOG_OF_ZERO: "Work with log_softmax or log_sigmoid, or add an epsilon that the "
    "dtype can hold inside the logarithm.",
    OUT_OF_DOMAIN: "Clip the operand, or choose a safe operand by jnp.where before the "
    "function, not after it.",
    NAN_OF_INF: "An Inf met another Inf, or a zero: mask with a large finite number "
    "instead of Inf, and mask no row entirely.",
    CANCELLATION: "Subtract before squaring and summing, or keep the function in "
    "float32: mpjax.full_precision(fn); clipping would only hide it.",
    SINGULAR: "It has no inverse: add a small multiple of the identity, or use "
    "jnp.linalg.lstsq or pinv.",
    NOT_POSITIVE: "Add a small multiple of the identity, and check that the matrix is "
    "symmetric.",
    CONSTANT_CAST: "Take a number that the dtype can hold, jnp.finfo(x.dtype).min for "
    "a mask, or keep the operation in float32 (mpjax.autocast does).",
    INPUT: "Look at the data, or at the step that computed the parameters.",
    CONSTANT: "The function returns a constant that is not finite.",
    UNKNOWN: "",
}


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """The first operation whose Inf or NaN reached an output.

    Attributes:
      cause: "overflow of half precision" (finite in float32), "overflow", "division by
        zero", "logarithm of zero", "outside of the function's domain", "difference of
        half results" (a difference that a half matmul's rounding put below zero, before
        a square root or the like), "singular matrix", "matrix that is not positive
        definite", "NaN from Inf" (Inf - Inf, 0 * Inf), "constant that a cast turned to
        Inf", "already in an input", "a constant of the function" or "unknown".
      primitive: name of the operation; empty for an input or constant.
      scope: its name scope.
      source: the user's source line, `model.py:12:4 (loss_fn)`.
      is_backward: whether it belongs to the backward pass. JAX computes some
        derivatives in the forward pass already: 1 / (2 sqrt(x)) is a `div` at the line
        of the square root.
      dtype: dtype of its output.
      shape: shape of its output.
      num_nan: number of NaN in its output.
      num_inf: number of Inf in its output.
      index: index of the first NaN or Inf.
      largest_input: the largest finite magnitude among its inputs; None if there is
        none.
      iterations: the iteration of each surrounding loop, the outermost first.
      leaf: path of the argument, `args[0]['w']`, if the cause is an input.
      matmul: the half matmul that a "difference of half results" comes from.
      parameters: paths of the parameters whose gradients are not finite, in a train
        step or an update of `with_loss_scale`.
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
    matmul: str = ""
    parameters: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """What to do about it."""
        if self.cause == HALF_OVERFLOW and self.is_backward:
            return (
                "It is finite in float32: lower the loss scale, run the operation in "
                "float32, or use bfloat16."
            )
        if self.cause == OVERFLOW and self.primitive in primitives.MATMULS:
            return (
                "Its operands are huge: lower the learning rate or clip gradients if "
                "the weights have grown, or normalize the input."
            )
        return _REMEDIES[self.cause]

    def __str__(self) -> str:
        found = [f"{self.num_nan} NaN"] if self.num_nan else []
        found += [f"{self.num_inf} Inf"] if self.num_inf else []
        size = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        numbers = f"{' and '.join(found)} in {size}, the first at {self.index}"
        if self.cause == INPUT:
            text = f"{numbers} of {self.leaf}: {self.cause}. {self.remedy}"
            return f"{text} {self._gradients()}".rstrip()
        where = f"{self.primitive or 'constant'}"
        where += f" in {self.scope}" if self.scope else ""
        where += f" at {self.source}" if self.source else ""
        where += ", backward pass" if self.is_backward else ""
        if self.iterations:
            where += f", iteration {'.'.join(map(str, self.iterations))}"
        largest = self.largest_input
        given = "" if largest is None else f"; largest finite input {largest:.4g}"
        if self.matmul:
            given += f"; its input holds rounded results of {self.matmul}"
        text = f"{self.cause}: {where} gave {numbers}{given}. {self.remedy}".rstrip()
        return f"{text} {self._gradients()}".rstrip()

    def _gradients(self) -> str:
        if not self.parameters:
            return ""
        shown = ", ".join(self.parameters[:8])
        more = len(self.parameters) - 8
        shown += f" and {more} more" if more > 0 else ""
        return f"Not finite are the gradients of {shown}."


def count(x: Any) -> tuple[int, int, tuple[int, ...]]:
    """Returns `(num_nan, num_inf, index)` of an array: the counts, and the first."""
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
        if is_floating(x) and x.size:
            magnitude = np.abs(np.asarray(x).astype(np.float64))
            finite = magnitude[np.isfinite(magnitude)]
            found += [float(finite.max())] if finite.size else []
    return max(found, default=None)


def find_cause(eqn: Any, values: list[Any], outputs: list[Any]) -> str:
    """Returns why an equation gave Inf or NaN.

    Args:
      eqn: the equation.
      values: its inputs; Inf among them comes from constants only.
      outputs: its outputs.
    """
    facts = primitives.facts_of(eqn)
    num_nan = sum(count(x)[0] for x in outputs if is_inexact(x))
    if eqn.primitive.name == "triangular_solve" and _has_zero_diagonal(eqn, values[0]):
        return SINGULAR
    if eqn.primitive.name == "cholesky" and np.isfinite(_wide(values[0])).all():
        return NOT_POSITIVE
    operand = _operand(eqn, values)
    out_of_domain = facts.outside_domain if num_nan else None
    if operand is not None and out_of_domain and np.any(out_of_domain(operand)):
        return OUT_OF_DOMAIN
    if any(not np.isfinite(_wide(x)).all() for x in values if is_inexact(x)):
        return NAN_OF_INF if num_nan else UNKNOWN
    if operand is not None and facts.pole and np.any(operand == facts.pole[1]):
        return LOG_OF_ZERO if facts.is_logarithm else DIVISION_BY_ZERO
    if any(map(is_half, outputs)) and _is_finite_in_float32(eqn, values):
        return HALF_OVERFLOW
    return UNKNOWN if num_nan else OVERFLOW


def _has_zero_diagonal(eqn: Any, matrix: Any) -> bool:
    if eqn.params["unit_diagonal"]:
        return False
    return bool(np.any(np.diagonal(np.asarray(matrix), axis1=-2, axis2=-1) == 0))


def _operand(eqn: Any, values: list[Any]) -> Any:
    """Returns the operand that may be at a pole or out of the domain, as float64."""
    facts = primitives.facts_of(eqn)
    if facts.pole is None and facts.outside_domain is None:
        return None
    if eqn.primitive.name == "integer_pow" and eqn.params["y"] >= 0:
        return None
    value = values[facts.pole[0] if facts.pole else 0]
    return _wide(value) if is_inexact(value) else None


def _is_finite_in_float32(eqn: Any, values: list[Any]) -> bool:
    if eqn.primitive.name == "convert_element_type":
        return True  # Its input is finite.
    widened = [x.astype(jnp.float32) if is_half(x) else x for x in values]
    params = dict(eqn.params)
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = np.dtype(np.float32)
    try:
        outputs = _jaxpr.bind(eqn.replace(params=params), *widened)
    except Exception:  # A primitive that takes these dtypes only.
        return False
    return all(np.isfinite(_wide(x)).all() for x in outputs if is_inexact(x))


def _wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x if x.dtype.kind == "c" else x.astype(np.float64)


def _numpy_dtype(x: np.ndarray) -> Any:
    return x.dtype if x.dtype.kind == "f" else np.float32
