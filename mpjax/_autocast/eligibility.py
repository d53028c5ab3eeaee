"""Decisions about single equations: whether one may run in half, and why not."""

import enum
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax._jaxpr.core import Literal, canonical_precision, is_float32, is_inexact_aval
from mpjax._jaxpr.primitives import facts_of
from mpjax._jaxpr.provenance import is_linear_algebra


class Rounding(enum.Enum):
    """How a constant survives in a narrower format."""

    EXACT = "exact"
    ROUNDS = "rounds"
    OUT_OF_RANGE = "out of range"


@functools.lru_cache(maxsize=4096)
def classify_rounding(value: float, dtype: Any) -> Rounding:
    """Returns how `value` survives a cast to a half dtype.

    A value is out of range if it overflows, or lies below the smallest normal number,
    where an epsilon loses bits or flushes to zero.
    """
    if math.isnan(value) or math.isinf(value):
        return Rounding.EXACT
    with np.errstate(all="ignore"):
        rounded = float(np.asarray(value, np.float32).astype(dtype))
    if rounded == value:
        return Rounding.EXACT
    info = jnp.finfo(dtype)
    in_range = float(info.smallest_normal) <= abs(value) <= float(info.max)
    return Rounding.ROUNDS if in_range else Rounding.OUT_OF_RANGE


def is_eligible(eqn: Any) -> bool:
    """Whether all floating operands and outputs were traced as float32."""
    for atom in eqn.invars:
        if not is_float32(atom.aval) and is_inexact_aval(atom.aval):
            return False
    found = False
    for var in eqn.outvars:
        if is_float32(var.aval):
            found = True
        elif is_inexact_aval(var.aval):
            return False
    return found


def asks_for_sign(eqn: Any) -> bool:
    """Whether it compares a number with zero; rounding does not change the sign.

    Numbers too small for half are the exception: the comparison then sees the zero that
    a matmul gets.
    """
    return facts_of(eqn).compares_order and any(
        isinstance(x, Literal) and np.ndim(x.val) == 0 and x.val == 0
        for x in eqn.invars
    )


def derivative_is_sum(eqn: Any) -> bool:
    """Whether an equation repeats numbers of an array, so that its derivative is a sum.

    The gradient of a bias is such a sum, and must not run in half.
    """
    if not facts_of(eqn).repeats or isinstance(eqn.invars[0], Literal):
        return False
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return [n for n in before if n != 1] != [n for n in after if n != 1]


def is_reduced_precision(eqn: Any) -> bool:
    """Whether it rounds to a narrower format than float32, kept in float32.

    JAX puts a `reduce_precision` of float32's own width around what a checkpoint saves;
    such an equation rounds nothing.
    """
    params = eqn.params
    return eqn.primitive.name == "reduce_precision" and (
        params["exponent_bits"] < 8 or params["mantissa_bits"] < 23
    )


def params_in_half(eqn: Any, dtype: Any) -> dict[str, Any] | None:
    """Returns an equation's parameters where they name a floating format; else None."""
    if eqn.primitive.name == "convert_element_type":
        return eqn.params | {"new_dtype": dtype, "weak_type": False}
    if eqn.primitive.name == "reduce_precision":
        info = jnp.finfo(dtype)
        return {"exponent_bits": info.nexp, "mantissa_bits": info.nmant}
    return None


def why_not_half(eqn: Any, ambient_precision: Any) -> str:
    """Returns why a matmul stays in float32, or an empty string."""
    if not is_eligible(eqn):
        dtypes = sorted({str(a.aval.dtype) for a in eqn.invars if hasattr(a, "aval")})
        return f"traced in {', '.join(dtypes)}"
    precision = canonical_precision(eqn.params.get("precision"))
    if asks_for_more(precision) and precision != canonical_precision(ambient_precision):
        return f"precision={_precision_name(precision)} asked for"
    if eqn.primitive.name == "dot_general":
        if not _is_sum(eqn):
            return "contracts no more than one element"
        if _is_scalar_product(eqn):
            return "a scalar product, which is a sum"
    if is_linear_algebra(eqn):
        return "part of linear algebra or its derivative"
    return ""


def asks_for_more(precision: Any) -> bool:
    """Whether a matmul's precision is anything but None and DEFAULT."""
    if precision is None:
        return False
    parts = precision if isinstance(precision, tuple) else (precision,)
    return any(_precision_name(part) not in ("None", "DEFAULT") for part in parts)


def _is_sum(dot: Any) -> bool:
    """Whether it contracts more than one element; an unknown size counts as more."""
    (lhs_contract, _), _ = dot.params["dimension_numbers"]
    num = math.prod(dot.invars[0].aval.shape[axis] for axis in lhs_contract)
    return not isinstance(num, int) or num > 1


def _is_scalar_product(dot: Any) -> bool:
    """Whether no free axis of either operand is longer than 1.

    Each of its results is then one sum over all that it takes of both operands, as
    `vdot` and `inner` of vectors are. An unknown size counts as more than 1.
    """
    return all(
        isinstance(size, int) and size == 1
        for x, contract, batch in zip(
            dot.invars, *dot.params["dimension_numbers"], strict=True
        )
        for axis, size in enumerate(x.aval.shape)
        if axis not in (*contract, *batch)
    )


def _precision_name(precision: Any) -> str:
    if isinstance(precision, tuple):
        return "/".join(sorted({_precision_name(part) for part in precision}))
    return getattr(precision, "name", str(precision))
