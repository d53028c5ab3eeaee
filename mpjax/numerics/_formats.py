"""What a half-precision format loses of a histogram, and which loss scale loses least.

"Mixed Precision Training", section 3.2: choose a scale that lifts the gradients into
the format's range without pushing the largest beyond it.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mpjax.numerics._histogram import NUM_CLASSES, ExponentHistogram, decompose


class _Format(NamedTuple):
    """The range of a floating-point format.

    Attributes:
      num_fraction_bits: stored bits of the fraction.
      min_exponent: exponent of the smallest normal number.
      max_exponent: exponent of the largest number.
      overflow_class: lowest class of fractions (`ExponentHistogram`) in which a number
        of the largest exponent rounds to more than the largest number.
    """

    num_fraction_bits: int
    min_exponent: int
    max_exponent: int
    overflow_class: int

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest subnormal number."""
        return self.min_exponent - self.num_fraction_bits


FORMATS = {
    "float16": _Format(10, -14, 15, 5),
    "bfloat16": _Format(7, -126, 127, 4),
    "float8_e4m3fn": _Format(3, -6, 8, 2),
    "float8_e5m2": _Format(2, -14, 15, 3),
}


class RepresentableFraction(NamedTuple):
    """What a cast makes of finite nonzero numbers; the four shares add up to 1.

    Attributes:
      zero: share that rounds to zero.
      subnormal: share that becomes subnormal, and loses bits.
      normal: share that keeps the format's full precision.
      overflow: share that rounds to Inf (NaN in float8_e4m3fn).
    """

    zero: Any
    subnormal: Any
    normal: Any
    overflow: Any


class LossAtScale(NamedTuple):
    """What a format loses of scaled numbers, in shares of the nonzero ones.

    Attributes:
      loss_scale: power of two.
      zero: share that rounds to zero.
      subnormal: share that becomes subnormal, and loses bits.
      overflow: share that rounds to Inf or NaN.
    """

    loss_scale: float
    zero: float
    subnormal: float
    overflow: float


@dataclasses.dataclass(frozen=True)
class LossScaleAdvice:
    """Which loss scale loses least, and why.

    Attributes:
      loss_scale: a power of two.
      reason: one sentence.
      table: the loss at every scale considered, the smallest scale first.
    """

    loss_scale: float
    reason: str
    table: tuple[LossAtScale, ...]

    def __str__(self) -> str:
        lines = [self.reason, f"{'scale':>8}  {'zero':>8}  subnormal  overflow"]
        for row in self.table:
            mark = "  <" if row.loss_scale == self.loss_scale else ""
            lines.append(
                f"{f'2^{round(math.log2(row.loss_scale))}':>8}  {row.zero:8.3%}  "
                f"{row.subnormal:9.3%}  {row.overflow:8.3%}{mark}"
            )
        return "\n".join(lines)


def representable_fraction(
    histogram: ExponentHistogram, dtype: Any, loss_scale: Any = 1.0
) -> RepresentableFraction:
    """Returns what a format keeps of the numbers in a histogram.

    The shares are exactly those of casting the numbers with rounding to nearest even,
    where float8 overflows instead of saturating. Numbers outside the histogram's range
    count as the next power of two, 2**(lo - 1) or 2**(hi + 1). Subnormals count as
    kept, though some devices flush them to zero.

    Args:
      histogram: from `exponent_histogram`.
      dtype: float16, bfloat16, float8_e4m3fn or float8_e5m2.
      loss_scale: power of two that multiplies the numbers before the cast; a number or
        a traced scalar.

    Returns:
      Shares of the finite nonzero numbers, all 0 if there are none: NumPy float64, or
      float32 under jit.

    Raises:
      ValueError: for another dtype, or a loss scale that is not a power of two (a
        traced one is not checked).

    >>> from mpjax.numerics import exponent_histogram
    >>> h = exponent_histogram(jnp.array([2.0**-26, 2.0**-20, 1.0, 65536.0]))
    >>> [float(representable_fraction(h, "float16", s).zero) for s in (1, 2, 4)]
    [0.25, 0.25, 0.0]
    """
    return _fractions(histogram, format_of(dtype), _log2(loss_scale))


def float8_fraction(histogram: ExponentHistogram, dtype: Any) -> RepresentableFraction:
    """Returns what float8 keeps of numbers that are scaled as `mixed_float8` does.

    The scale is the largest power of two at which nothing overflows, so the shares that
    count are those that flush to zero, or lose bits as subnormals.

    Args:
      histogram: of an operand of a matmul, from `probe(fn, operands=True)`.
      dtype: float8_e4m3fn, which values take, or float8_e5m2, which cotangents take.

    Returns:
      Shares of the finite nonzero numbers, as `representable_fraction`.

    >>> from mpjax.numerics import exponent_histogram
    >>> h = exponent_histogram(jnp.array([1.0, 2.0**-16, 2.0**-18, 2.0**-20]))
    >>> found = float8_fraction(h, "float8_e4m3fn")
    >>> float(found.zero), float(found.subnormal), float(found.normal)
    (0.5, 0.25, 0.25)
    """
    fmt = format_of(dtype)
    return _fractions(histogram, fmt, best_shift_limit(histogram, fmt, 0))


def recommend_loss_scale(
    histogram: ExponentHistogram,
    dtype: Any = "float16",
    *,
    headroom: int = 1,
    max_loss_scale: float = 2.0**24,
) -> LossScaleAdvice:
    """Advises the power of two, at least 1, at which a format loses least.

    A scale qualifies if nothing overflows, and the largest number stays `headroom`
    powers of two below the format's largest exponent. Among the scales that qualify,
    the advice is the one at which the fewest numbers become zero, then the fewest
    become subnormal; then the smallest scale.

    Args:
      histogram: exponents of unscaled gradients; include those of activations if they
        are available.
      dtype: as in `representable_fraction`.
      headroom: powers of two kept free above the largest number seen, for larger ones
        to come.
      max_loss_scale: largest scale considered.

    Returns:
      A `LossScaleAdvice`.

    Raises:
      TypeError: under jit, where there are no numbers to give a reason for.
      ValueError: for another dtype, a negative headroom or a maximum below 1.
    """
    fmt = format_of(dtype)
    name = jnp.dtype(dtype).name
    if not _is_known(histogram):
        raise TypeError(
            "recommend_loss_scale explains itself, so it needs numbers: return the "
            "histogram from the jitted function, and call it outside of jit."
        )
    if headroom < 0 or not 1 <= max_loss_scale < math.inf:
        raise ValueError(
            f"headroom={headroom} must be at least 0, and max_loss_scale="
            f"{max_loss_scale} at least 1."
        )
    total = max(int(histogram.num_nonzero), 1)
    shifts = range(math.floor(math.log2(max_loss_scale)) + 1)
    lost = [
        tuple(int(n) for n in _count_lost(histogram, fmt, shift, np))
        for shift in shifts
    ]
    table = tuple(
        LossAtScale(2.0**shift, *(n / total for n in counts))
        for shift, counts in zip(shifts, lost, strict=True)
    )
    free = [int(best_shift_limit(histogram, fmt, spare)) for spare in (headroom, 0)]
    fits = (
        [s for s in shifts if s <= free[0]]
        or [s for s in shifts if s <= free[1]]
        or [0]
    )
    best = min(fits, key=lambda s: (lost[s][0], lost[s][1], s))
    reason = _reason(histogram, name, table, best, fits)
    return LossScaleAdvice(2.0**best, reason, table)


def best_shift_limit(histogram: ExponentHistogram, fmt: _Format, headroom: int) -> Any:
    """Returns the largest log2 of a scale at which nothing overflows.

    Args:
      histogram: known or traced.
      fmt: one of `FORMATS`.
      headroom: powers of two to keep free.

    Returns:
      An int32 scalar; very large if no number could overflow.
    """
    xp: Any = np if _is_known(histogram) else jnp
    counts = xp.asarray(histogram.class_counts)
    exponents = xp.asarray(histogram.exponents)[:, None]
    overflows = np.arange(NUM_CLASSES) >= fmt.overflow_class
    # A number that rounds up counts with the next exponent.
    reached = xp.where(counts > 0, exponents + overflows, -(10**6)).max()
    reached = xp.where(histogram.above > 0, histogram.hi + 1, reached)
    reached = xp.where(
        (reached == -(10**6)) & (histogram.below > 0), histogram.lo - 1, reached
    )
    return fmt.max_exponent - headroom - reached


def _fractions(
    histogram: ExponentHistogram, fmt: _Format, shift: Any
) -> RepresentableFraction:
    xp: Any = np if _is_known((histogram, shift)) else jnp
    lost = _count_lost(histogram, fmt, shift, xp)
    total = xp.maximum(histogram.num_nonzero, 1)
    zero, subnormal, overflow = (n / total for n in lost)
    normal = (histogram.num_nonzero - sum(lost)) / total
    return RepresentableFraction(zero, subnormal, normal, overflow)


def _count_lost(
    histogram: ExponentHistogram, fmt: _Format, shift: Any, xp: Any
) -> tuple[Any, Any, Any]:
    """Counts the numbers that become zero, subnormal and infinite."""
    counts = xp.asarray(histogram.class_counts)
    moved = xp.asarray(histogram.exponents)[:, None] + shift
    classes = np.arange(NUM_CLASSES)
    # Half of the smallest subnormal number is a tie, which rounds to zero.
    half = fmt.smallest_exponent - 1
    zero = (moved < half) | ((moved == half) & (classes == 0))
    subnormal = (moved < fmt.min_exponent) & ~zero
    overflow = (moved > fmt.max_exponent) | (
        (moved == fmt.max_exponent) & (classes >= fmt.overflow_class)
    )
    below = histogram.lo - 1 + shift
    above = histogram.hi + 1 + shift

    def number(mask, outside):
        inside = xp.where(mask, counts, 0).sum((-2, -1))
        return (
            inside
            + xp.where(outside(below), histogram.below, 0)
            + xp.where(outside(above), histogram.above, 0)
        )

    return (
        number(zero, lambda e: e <= half),
        number(subnormal, lambda e: (half < e) & (e < fmt.min_exponent)),
        number(overflow, lambda e: e > fmt.max_exponent),
    )


def _reason(histogram, name, table, best, fits) -> str:
    nonfinite = int(histogram.infs) + int(histogram.nans)
    ignored = f" ({nonfinite} Inf or NaN ignored)" if nonfinite else ""
    if not int(histogram.num_nonzero):
        return f"Every number is zero: no loss scale makes a difference{ignored}."
    here, unscaled = table[best], table[0]
    if here.overflow:
        return (
            f"{here.overflow:.3%} of the nonzero numbers overflow {name} without any "
            f"loss scale, and no loss scale helps: use bfloat16 or float32{ignored}."
        )
    if best == 0:
        if unscaled.zero or unscaled.subnormal:
            return (
                f"No scale that leaves the largest number room in {name} loses less "
                f"than a scale of 1: {unscaled.zero:.3%} of the nonzero numbers become "
                f"zero, and {unscaled.subnormal:.3%} lose bits{ignored}."
            )
        return f"{name} holds every number in full without a loss scale{ignored}."
    parts = [
        f"2^{best} lowers the share that becomes zero in {name} from "
        f"{unscaled.zero:.3%} to {here.zero:.3%}, and the share that loses bits from "
        f"{unscaled.subnormal:.3%} to {here.subnormal:.3%}"
    ]
    if best == max(fits) and (here.zero or here.subnormal) and best + 1 < len(table):
        parts.append("; a larger scale leaves the largest number no headroom")
    return "".join(parts) + f"{ignored}."


def format_of(dtype: Any) -> _Format:
    """Returns the format of a dtype.

    Raises:
      ValueError: if it is not in `FORMATS`.
    """
    try:
        return FORMATS[jnp.dtype(dtype).name]
    except (TypeError, KeyError):
        raise ValueError(
            f"expected one of {', '.join(FORMATS)}, got {dtype!r}."
        ) from None


def _log2(loss_scale: Any) -> Any:
    if not _is_known(loss_scale):
        return decompose(jnp.asarray(loss_scale, jnp.float32))[0]
    fraction, exponent = math.frexp(float(loss_scale))
    if fraction != 0.5:
        raise ValueError(
            f"loss_scale={loss_scale} must be a power of two: any other scale rounds "
            "every number, and a histogram of exponents cannot tell how."
        )
    return exponent - 1


def _is_known(tree: Any) -> bool:
    return not any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))
