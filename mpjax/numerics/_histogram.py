"""Histograms of exponents: which powers of two a tree of numbers spans.

Exponents are read from the bits in integer arithmetic, so no number is rounded, and no
subnormal number is flushed to zero.
"""

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._struct import pytree_dataclass

# A number is 2**exponent * (1 + fraction). The class of its fraction decides whether it
# rounds to zero, or beyond the largest number, in each of `FORMATS` (_formats.py). The
# classes: 0; up to 0.8125; below 0.875; below 1 - 2**-8; below 1 - 2**-11; below 1.
NUM_CLASSES = 6
# Counts are made in this many rows, so that threads seldom add to the same element.
_NUM_ROWS = 32
_MAX_SIZE = 2**31 - 1


@pytree_dataclass(static=("lo", "hi"))
class ExponentHistogram:
    """How many numbers have each exponent; signs are ignored.

    The magnitude of a number with exponent e lies in [2**e, 2**(e + 1)). Histograms of
    the same range can be added: `a + b`. All counts are int32 arrays; under `vmap` they
    have leading axes.

    Attributes:
      class_counts: (hi - lo + 1, 6); numbers per exponent and class of fraction. The
        classes make the rounding to half exact.
      zeros: scalar; number of zeros.
      below: scalar; nonzero numbers whose exponent is below `lo`.
      above: scalar; finite numbers whose exponent is above `hi`.
      infs: scalar; number of Inf.
      nans: scalar; number of NaN.
      lo: smallest exponent with a bin of its own.
      hi: largest exponent with a bin of its own.
    """

    class_counts: Any
    zeros: Any
    below: Any
    above: Any
    infs: Any
    nans: Any
    lo: int
    hi: int

    @property
    def counts(self) -> Any:
        """Number of values with each exponent: (hi - lo + 1,) int32."""
        return self.class_counts.sum(-1)

    @property
    def exponents(self) -> np.ndarray:
        """The exponents of `counts`: (hi - lo + 1,) integers."""
        return np.arange(self.lo, self.hi + 1)

    @property
    def num_nonzero(self) -> Any:
        """Number of finite nonzero numbers."""
        return self.counts.sum(-1) + self.below + self.above

    @property
    def num_values(self) -> Any:
        """Number of all values, zeros, Inf and NaN included."""
        return self.num_nonzero + self.zeros + self.infs + self.nans

    def __add__(self, other: Self) -> Self:
        """Returns the histogram of the numbers of both.

        Raises:
          ValueError: if the ranges differ.
        """
        if not isinstance(other, ExponentHistogram):
            return NotImplemented
        if (self.lo, self.hi) != (other.lo, other.hi):
            raise ValueError(
                f"histograms of exponents {self.lo} to {self.hi} and {other.lo} to "
                f"{other.hi} cannot be added; make both with the same lo= and hi=."
            )
        return jax.tree.map(lambda a, b: a + b, self, other)

    def __str__(self) -> str:
        """One line per exponent, with a bar."""
        counts = np.asarray(self.counts)
        if counts.ndim > 1:
            return repr(self)
        rows = [("zero", self.zeros), (f"< 2^{self.lo}", self.below)]
        shown = np.flatnonzero(counts)
        if shown.size:
            rows += [
                (f"2^{self.lo + i}", counts[i]) for i in range(shown[0], shown[-1] + 1)
            ]
        rows += [(f"> 2^{self.hi}", self.above), ("inf", self.infs), ("nan", self.nans)]
        total = max(int(self.num_values), 1)
        lines = (
            f"{name:>8}  {int(n):>12}  {n / total:7.2%}  "
            + "#" * round(40 * int(n) / total)
            for name, n in rows
            if n or name.startswith("2^")
        )
        return "\n".join(map(str.rstrip, lines))


def exponent_histogram(
    tree: Any,
    *,
    lo: int = -60,
    hi: int = 16,
    per_leaf: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> Any:
    """Counts the exponents of all numbers in a tree, exactly.

    Works under jit, vmap, scan and shard_map. Figures 2b and 3 of "Mixed Precision
    Training" (arXiv:1710.03740) show such histograms.

    Args:
      tree: floating arrays of any shape, float64 to float8: gradients, activations.
      lo: smallest exponent with a bin of its own; smaller numbers count as `below`.
      hi: largest exponent with a bin of its own; larger numbers count as `above`.
      per_leaf: return a tree of histograms, one per leaf, instead of their sum.
      axis_name: axes of the surrounding `shard_map` or `pmap` to sum over. Leave it out
        for leaves that every device holds whole.

    Returns:
      An `ExponentHistogram`, or a tree of them.

    Raises:
      TypeError: if a leaf is not floating.
      ValueError: if there is no leaf, if lo > hi, or if there are more than 2**31 - 1
        numbers.

    >>> h = exponent_histogram({"w": jnp.array([0.0, 1.0, 1.5, -2.0])}, lo=-1, hi=1)
    >>> h.counts.tolist(), int(h.zeros)
    ([0, 2, 1], 1)
    """
    _check_range(lo, hi)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    if not leaves:
        raise ValueError(
            f"expected a tree of floating arrays, got one without leaves: {tree!r}."
        )
    arrays = [_as_floating(path, x) for path, x in leaves]
    size = sum(x.size for x in arrays)
    if size > _MAX_SIZE:
        raise ValueError(
            f"{size} numbers are more than int32 can count; pass the tree in parts, "
            "and add up the counts as Python integers."
        )
    found = [_count(x, lo, hi) for x in arrays]
    if axis_name is not None:
        found = lax.psum(found, axis_name)
    if per_leaf:
        return jax.tree.unflatten(treedef, found)
    return sum(found[1:], start=found[0])


def empty_histogram(lo: int = -60, hi: int = 16) -> ExponentHistogram:
    """Returns the histogram of no numbers, the start of a sum over steps."""
    _check_range(lo, hi)
    zero = jnp.zeros((), jnp.int32)
    counts = jnp.zeros((hi - lo + 1, NUM_CLASSES), jnp.int32)
    return ExponentHistogram(counts, zero, zero, zero, zero, zero, lo, hi)


def decompose(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits nonzero numbers into exponent and fraction, by their bits.

    Args:
      x: floating array of at least 16 bits.

    Returns:
      `(exponents, fractions)`, both of the shape of `x`: floor(log2(|x|)) as int32, for
      Inf and NaN one more than the largest exponent; and the bits of
      |x| / 2**exponent - 1, aligned to the most significant bit, as uint32 (uint64 for
      float64).
    """
    info = jnp.finfo(x.dtype)
    width = max(info.bits, 32)
    unsigned = jnp.dtype(f"uint{width}")
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{info.bits}")).astype(unsigned)
    mantissa = bits & unsigned.type(2**info.nmant - 1)
    biased = (bits >> info.nmant) & unsigned.type(2**info.nexp - 1)
    leading = lax.clz(mantissa)  # The width itself if the mantissa is zero.
    is_subnormal = biased == 0
    exponents = jnp.where(
        is_subnormal,
        int(info.minexp) - info.nmant + (width - 1) - leading.astype(jnp.int32),
        biased.astype(jnp.int32) + (int(info.minexp) - 1),
    )
    # In XLA a shift by the whole width is zero.
    shift = jnp.where(is_subnormal, leading + 1, unsigned.type(width - info.nmant))
    return exponents, lax.shift_left(mantissa, shift.astype(unsigned))


def _count(x: jax.Array, lo: int, hi: int) -> ExponentHistogram:
    x = lax.stop_gradient(x).reshape(-1)
    if jnp.finfo(x.dtype).bits < 16:
        x = x.astype(jnp.float32)  # Exact: float8 is normal there.
    info = jnp.finfo(x.dtype)
    exponents, fractions = decompose(x)
    one = 2 ** (8 * fractions.dtype.itemsize)
    classes = (
        (fractions != 0).astype(jnp.int32)
        + (fractions > fractions.dtype.type(one * 13 // 16))
        + (fractions >= fractions.dtype.type(one * 7 // 8))
        + (fractions >= fractions.dtype.type(one - one // 2**8))
        + (fractions >= fractions.dtype.type(one - one // 2**11))
    )
    num_classed = (hi - lo + 1) * NUM_CLASSES
    zeros, below, above, infs, nans = range(num_classed, num_classed + 5)
    index = (exponents - lo) * NUM_CLASSES + classes
    index = jnp.where(exponents < lo, below, index)
    index = jnp.where(exponents > hi, above, index)
    not_finite = exponents > int(info.maxexp) - 1
    index = jnp.where(not_finite, jnp.where(fractions == 0, infs, nans), index)
    is_zero = exponents < int(info.minexp) - info.nmant
    index = jnp.where(is_zero, zeros, index)

    num_bins = num_classed + 5
    rows = lax.iota(jnp.int32, x.size) % _NUM_ROWS
    table = jnp.zeros((_NUM_ROWS * num_bins,), jnp.int32)
    table = table.at[rows * num_bins + index].add(1, mode="promise_in_bounds")
    counts = table.reshape(_NUM_ROWS, num_bins).sum(0, dtype=jnp.int32)
    class_counts = counts[:num_classed].reshape(hi - lo + 1, NUM_CLASSES)
    zeros, below, above, infs, nans = counts[num_classed:]
    return ExponentHistogram(class_counts, zeros, below, above, infs, nans, lo, hi)


def _as_floating(path: Any, x: Any) -> jax.Array:
    if isinstance(x, float):
        x = jnp.asarray(x)
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"expected floating arrays, got {dtype or type(x).__name__} at "
            f"tree{jax.tree_util.keystr(path)}; leave such leaves out, or take .real "
            "and .imag of complex ones."
        )
    return jnp.asarray(x)


def _check_range(lo: int, hi: int) -> None:
    for name, value in (("lo", lo), ("hi", hi)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(
                f"{name}={value!r} must be a whole number: the exponent of a power of "
                "two."
            )
    if lo > hi:
        raise ValueError(f"lo={lo} is above hi={hi}; swap them.")
