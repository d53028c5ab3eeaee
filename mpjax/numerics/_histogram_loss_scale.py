"""A loss scale driven by a histogram of the gradients' exponents.

"Mixed Precision Training", section 3.2: where gradient statistics are available, choose
"a factor so that its product with the maximum absolute gradient value is below 65,504".
`DynamicLossScale` follows the paper's other way: overflows show that a scale is too
large, and a time without overflows that it may be too small.
"""

import math
from typing import Any, Self

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpjax._struct import (
    is_count,
    pytree_dataclass,
    replace_leaves,
    require,
    set_field,
)
from mpjax._tree import int_array, is_floating, multiply
from mpjax.loss_scale import LARGEST_LOSS_SCALE, scale_array
from mpjax.numerics._formats import best_shift_limit, format_of
from mpjax.numerics._histogram import (
    ExponentHistogram,
    decompose,
    empty_histogram,
    exponent_histogram,
)


@pytree_dataclass(
    static=(
        "interval",
        "headroom",
        "dtype",
        "backoff_factor",
        "growth_interval",
        "min_loss_scale",
        "max_loss_scale",
    )
)
class HistogramLossScale:
    """A loss scale that samples the gradients and picks the scale that loses least.

    On the first clean step, and on every `interval`-th after it, `observe` takes the
    histogram of the scaled gradients' exponents, and picks the largest power of two
    that leaves the largest gradient `headroom` powers of two below the largest exponent
    of `dtype`. No other scale with as much headroom loses less: a larger scale loses
    only by overflow. Whether a smaller scale would lose as little, the sample cannot
    tell, because gradients that underflowed in the backward pass are zero in it. If the
    sample contains only zeros, they count as just below the smallest subnormal number,
    so that the scale rises.

    On an overflow the scale backs off at once, and the next clean step is sampled.
    `adjust` is this state machine::

        if grads_finite:
            num_finite_steps += 1
            if num_finite_steps % growth_interval == 0:
                ceiling = min(2 * ceiling, max_loss_scale)
            loss_scale = min(picked, ceiling)
        else:
            num_finite_steps = 0
            loss_scale = ceiling = max(loss_scale * backoff_factor, min_loss_scale)

    The histogram does not see everything. Inside the backward pass, the gradients of
    activations, and of a loss that is computed in half, may overflow before the
    gradients of the parameters do; and gradients grow between samples. `headroom`
    allows for both. Where it does not suffice, the ceiling holds: a scale that
    overflowed is tried again only after `growth_interval` clean steps, so that in the
    long run overflows are no more frequent than with a `DynamicLossScale`.

    The scale is always a power of two. `with_loss_scale` calls `observe`; if nothing
    calls it, the scale only backs off and recovers.

    Attributes:
      loss_scale: float32 scalar; the current scale.
      interval: clean steps from one sample to the next.
      headroom: powers of two kept free above the largest gradient sampled. In six runs
        of four small networks, 1000 to 1500 steps each, 3 was the smallest headroom
        with which overflows were rare (up to 0.5 per run; with 2, up to 1.7). The
        maximum of the last four samples with a headroom of 2 did about as well, so only
        one sample is kept.
      dtype: float16, bfloat16, float8_e4m3fn or float8_e5m2: the dtype in which the
        backward pass computes; the gradients themselves may be float32.
      backoff_factor: in (0, 1).
      growth_interval: clean steps in a row before the ceiling rises.
      min_loss_scale: lower limit.
      max_loss_scale: upper limit, at most 2**126.
      picked: float32 scalar; the scale that the newest sample asks for.
      ceiling: float32 scalar; the largest scale that overflows allow.
      num_finite_steps: int32 scalar; clean steps since the last overflow.

    Raises:
      ValueError: if a setting is out of range, or a scale or factor is not a power of
        two.

    >>> scale = HistogramLossScale(2.0**10)
    >>> scaled_grads = {"w": jnp.array([2.0**-16, -0.75, 0.0])}
    >>> scale = scale.observe(scaled_grads).adjust(jnp.array(True))
    >>> float(scale.loss_scale)  # 2**13 times as large, 0.75 is below 2**(15 - 3 + 1).
    8388608.0
    """

    loss_scale: Any = 2.0**15
    interval: int = 100
    headroom: int = 3
    dtype: Any = "float16"
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_loss_scale: float = 1.0
    max_loss_scale: float = 2.0**24
    picked: Any = None
    ceiling: Any = None
    num_finite_steps: Any = 0

    def __post_init__(self):
        for name in ("interval", "growth_interval"):
            require(self, name, "a whole number of at least 1", is_count)
        require(self, "headroom", "a whole number of at least 0", _is_headroom)
        format_of(self.dtype)  # Raises an error that lists the formats.
        set_field(self, "dtype", jnp.dtype(self.dtype).name)
        require(self, "backoff_factor", "between 0 and 1", lambda x: 0 < x < 1)
        require(self, "min_loss_scale", "positive", lambda x: 0 < x < math.inf)
        top = LARGEST_LOSS_SCALE
        require(self, "max_loss_scale", "at most 2**126", lambda x: 0 < x <= top)
        for name in ("backoff_factor", "min_loss_scale", "max_loss_scale"):
            require(self, name, "a power of two", _is_power_of_two)
            set_field(self, name, float(getattr(self, name)))
        low, high = self.min_loss_scale, self.max_loss_scale
        if low > high:
            raise ValueError(
                f"min_loss_scale={low:g} is above max_loss_scale={high:g}; swap them "
                "or widen the range."
            )
        set_field(self, "loss_scale", scale_array(self.loss_scale, low, high))
        picked = self.loss_scale if self.picked is None else self.picked
        ceiling = high if self.ceiling is None else self.ceiling
        set_field(self, "picked", scale_array(picked, low, high))
        set_field(self, "ceiling", scale_array(ceiling, low, high))
        for name in ("loss_scale", "picked", "ceiling"):
            require(self, name, "a power of two", _is_power_of_two)
        set_field(self, "num_finite_steps", int_array(self.num_finite_steps))

    def scale(self, tree: Any) -> Any:
        """Multiplies the inexact leaves by the scale, in at least float32."""
        return multiply(tree, self.loss_scale)

    def unscale(self, tree: Any) -> Any:
        """Divides the inexact leaves by the scale, in at least float32."""
        return multiply(tree, 1 / self.loss_scale)

    def observe(
        self,
        scaled_grads: Any,
        *,
        axis_name: str | tuple[str, ...] | None = None,
    ) -> Self:
        """Samples the gradients if a sample is due; `adjust` then uses the result.

        Args:
          scaled_grads: gradients of the loss times `loss_scale`, before they are
            unscaled. Leaves that are not floating are left out.
          axis_name: mesh axes of the surrounding `shard_map`; all devices along them
            take the smallest scale that one of them picks.

        Returns:
          The loss scale, with a new `picked` if a sample was due.
        """
        leaves = [x for x in jax.tree.leaves(scaled_grads) if is_floating(x)]
        if not leaves:
            return self

        def sample():
            picked = self._pick(leaves)
            return picked if axis_name is None else lax.pmin(picked, axis_name)

        is_due = self.num_finite_steps % self.interval == 0
        keep = lambda: jnp.asarray(self.picked)
        return replace_leaves(self, picked=lax.cond(is_due, sample, keep))

    def adjust(self, grads_finite: jax.Array) -> Self:
        """Returns the loss scale for the next step.

        Args:
          grads_finite: boolean scalar; whether all gradients of this step were finite.
        """
        num_finite_steps = jnp.where(grads_finite, self.num_finite_steps + 1, 0)
        rises = num_finite_steps % self.growth_interval == 0
        higher = jnp.minimum(self.ceiling * 2, np.float32(self.max_loss_scale))
        ceiling = jnp.where(rises, higher, self.ceiling)
        smaller = jnp.maximum(
            self.loss_scale * np.float32(self.backoff_factor),
            np.float32(self.min_loss_scale),
        )
        picked = jnp.minimum(self.picked, ceiling)
        return replace_leaves(
            self,
            loss_scale=jnp.where(grads_finite, picked, smaller),
            ceiling=jnp.where(grads_finite, ceiling, smaller),
            num_finite_steps=num_finite_steps.astype(jnp.int32),
        )

    def _pick(self, leaves: list[Any]) -> jax.Array:
        """Returns the largest scale with enough headroom, a float32 scalar."""
        shift = best_shift_limit(
            _occupied(leaves, self.dtype), format_of(self.dtype), self.headroom
        )
        lowest, highest = _log2(self.min_loss_scale), _log2(self.max_loss_scale)
        exponent = decompose(jnp.asarray(self.loss_scale))[0] + shift
        # Read from a table, because exp2 rounds.
        scales = np.ldexp(1.0, np.arange(lowest, highest + 1)).astype(np.float32)
        return jnp.asarray(scales)[jnp.clip(exponent, lowest, highest) - lowest]


def _occupied(leaves: list[Any], dtype: str) -> ExponentHistogram:
    """Returns a histogram over the format's range with 1 in place of nonzero counts.

    Counts of many billions of parameters would not fit int32. Zeros count as `below`.
    """
    fmt = format_of(dtype)
    lo, hi = fmt.smallest_exponent - 1, fmt.max_exponent
    total = empty_histogram(lo, hi)
    for leaf in leaves:
        if leaf.size:
            total += jax.tree.map(jnp.sign, exponent_histogram(leaf, lo=lo, hi=hi))
    total = replace_leaves(total, below=total.below + total.zeros)
    return jax.tree.map(jnp.sign, total)


def _is_headroom(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and x is not True and int(x) >= 0


def _is_power_of_two(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer) or math.frexp(float(x))[0] == 0.5


def _log2(x: float) -> int:
    return math.frexp(x)[1] - 1
