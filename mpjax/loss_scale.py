"""Loss scales: none, static, and dynamic ("Mixed Precision Training", section 3.2).

Small gradients vanish in half precision. Multiplying the loss by S multiplies every
gradient by S; dividing the float32 gradients by S afterwards gives them back. All
scales here follow jmp's protocol: `.loss_scale`, `.scale(tree)`, `.unscale(tree)` and
`.adjust(grads_finite)`.
"""

import dataclasses
import math
import re
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.core
import jax.numpy as jnp
import jmp
import numpy as np

from mpjax._struct import (
    is_count,
    pytree_dataclass,
    replace_leaves,
    require,
    set_field,
)
from mpjax._tree import int_array, multiply, to_full

# The reciprocal of a larger float32 is subnormal, and most devices flush that to zero.
LARGEST_LOSS_SCALE = 2.0**126


@runtime_checkable
class LossScale(Protocol):
    """Protocol of jmp's loss scales and of those here."""

    @property
    def loss_scale(self) -> Any:
        """The current scale, a float32 scalar."""
        ...

    def scale(self, tree: Any) -> Any:
        """Multiplies a tree of losses or gradients by the scale."""
        ...

    def unscale(self, tree: Any) -> Any:
        """Divides a tree of gradients by the scale."""
        ...

    def adjust(self, grads_finite: jax.Array) -> Self:
        """Returns the loss scale for the next step."""
        ...


@pytree_dataclass()
class NoOpLossScale:
    """No loss scaling; unscaling still returns float32."""

    @property
    def loss_scale(self) -> np.float32:
        """1, as float32."""
        return np.float32(1)

    @property
    def min_loss_scale(self) -> float:
        """The scale never goes below 1."""
        return 1.0

    def scale(self, tree: Any) -> Any:
        """Returns the tree as it is."""
        return tree

    def unscale(self, tree: Any) -> Any:
        """Returns the tree with half-precision leaves cast to float32."""
        return jax.tree.map(to_full, tree)

    def adjust(self, grads_finite: jax.Array) -> Self:
        """Returns itself."""
        del grads_finite
        return self


@pytree_dataclass()
class StaticLossScale:
    """A constant loss scale. Its value is a leaf: another value does not recompile.

    Attributes:
      loss_scale: float32 scalar, positive and at most 2**126.

    Raises:
      ValueError: if the scale is not positive, or larger than 2**126.
    """

    loss_scale: Any

    def __post_init__(self):
        set_field(self, "loss_scale", scale_array(self.loss_scale))

    @property
    def min_loss_scale(self) -> Any:
        """The scale never moves."""
        return self.loss_scale

    def scale(self, tree: Any) -> Any:
        """Multiplies the inexact leaves, in float32 at least."""
        return multiply(tree, self.loss_scale)

    def unscale(self, tree: Any) -> Any:
        """Divides the inexact leaves, in float32 at least."""
        return multiply(tree, 1 / self.loss_scale)

    def adjust(self, grads_finite: jax.Array) -> Self:
        """Returns itself."""
        del grads_finite
        return self


@pytree_dataclass(
    static=(
        "growth_interval",
        "growth_factor",
        "backoff_factor",
        "hysteresis",
        "min_loss_scale",
        "max_loss_scale",
    )
)
class DynamicLossScale:
    """A loss scale that backs off on an overflow and grows after clean steps.

    `adjust` is this state machine, on float32 and int32 scalars::

        if grads_finite:
            num_finite_steps += 1
            if num_finite_steps == growth_interval:
                loss_scale = min(loss_scale * growth_factor, max_loss_scale)
                num_finite_steps, hysteresis_left = 0, hysteresis
        else:
            num_finite_steps = 0
            hysteresis_left = max(hysteresis_left - 1, 0)
            if hysteresis_left == 0:
                loss_scale = max(loss_scale * backoff_factor, min_loss_scale)

    With `hysteresis=1` every overflow backs off. With `hysteresis=n` the first n - 1
    overflows since the last growth are forgiven; from then on each backs off.

    The scale stays a power of two when it began as one and factors and limits are
    powers of two; scaling is then exact.

    Where other libraries differ:

    ====================  =======  ============  =======  ========
    library               initial  grows after   minimum  maximum
    ====================  =======  ============  =======  ========
    mpjax                 2**15    interval      1        2**24
    torch GradScaler      2**16    interval      none     none (a)
    Keras                 2**15    interval      none     none
    flax DynamicScale     2**16    interval + 1  1.2e-38  3.4e38
    jmp DynamicLossScale  given    interval      1 (b)    none (a)
    ====================  =======  ============  =======  ========

    All start from an interval of 2000 and the factors 2 and 1/2; none but mpjax has
    hysteresis. (a) It stops growing where float32 ends. (b) Lost in any tree.map or
    jit. Keras and torch count skipped steps as mpjax does.

    Attributes:
      loss_scale: float32 scalar; the current scale.
      growth_interval: clean steps in a row before the scale grows.
      growth_factor: at least 1.
      backoff_factor: in (0, 1).
      hysteresis: how many overflows it takes to back off; at least 1.
      min_loss_scale: positive lower limit.
      max_loss_scale: upper limit, at most 2**126.
      num_finite_steps: int32 scalar; clean steps since the last growth or overflow.
      hysteresis_left: int32 scalar; overflows until the scale backs off.

    Raises:
      ValueError: if a setting is out of its range.
    """

    loss_scale: Any = 2.0**15
    growth_interval: int = 2000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    hysteresis: int = 1
    min_loss_scale: float = 1.0
    max_loss_scale: float = 2.0**24
    num_finite_steps: Any = 0
    hysteresis_left: Any = None

    def __post_init__(self):
        for name in ("growth_interval", "hysteresis"):
            require(self, name, "a whole number of at least 1", is_count)
        require(self, "growth_factor", "at least 1", lambda x: 1 <= x < math.inf)
        require(self, "backoff_factor", "between 0 and 1", lambda x: 0 < x < 1)
        require(self, "min_loss_scale", "positive", lambda x: 0 < x < math.inf)
        top = LARGEST_LOSS_SCALE
        require(self, "max_loss_scale", "at most 2**126", lambda x: 0 < x <= top)
        low, high = float(self.min_loss_scale), float(self.max_loss_scale)
        if low > high:
            raise ValueError(
                f"min_loss_scale={low:g} is above max_loss_scale={high:g}; swap them "
                "or widen the range."
            )
        for name in ("growth_factor", "backoff_factor"):
            set_field(self, name, float(getattr(self, name)))
        set_field(self, "min_loss_scale", low)
        set_field(self, "max_loss_scale", high)
        set_field(self, "loss_scale", scale_array(self.loss_scale, low, high))
        left = self.hysteresis if self.hysteresis_left is None else self.hysteresis_left
        set_field(self, "hysteresis_left", int_array(left))
        set_field(self, "num_finite_steps", int_array(self.num_finite_steps))

    def scale(self, tree: Any) -> Any:
        """Multiplies the inexact leaves, in float32 at least."""
        return multiply(tree, self.loss_scale)

    def unscale(self, tree: Any) -> Any:
        """Divides the inexact leaves, in float32 at least."""
        return multiply(tree, 1 / self.loss_scale)

    def adjust(self, grads_finite: jax.Array) -> Self:
        """Returns the loss scale for the next step.

        Args:
          grads_finite: boolean scalar; whether this step's gradients were all finite.
        """
        clean = jnp.where(grads_finite, self.num_finite_steps + 1, 0)
        grow = clean == self.growth_interval
        left = jnp.where(grads_finite, self.hysteresis_left, self.hysteresis_left - 1)
        left = jnp.maximum(left, 0)
        back_off = ~grads_finite & (left == 0)
        larger = jnp.minimum(
            self.loss_scale * np.float32(self.growth_factor),
            np.float32(self.max_loss_scale),
        )
        smaller = jnp.maximum(
            self.loss_scale * np.float32(self.backoff_factor),
            np.float32(self.min_loss_scale),
        )
        scale = jnp.where(grow, larger, jnp.where(back_off, smaller, self.loss_scale))
        return replace_leaves(
            self,
            loss_scale=scale,
            num_finite_steps=jnp.where(grow, 0, clean).astype(jnp.int32),
            hysteresis_left=jnp.where(grow, self.hysteresis, left).astype(jnp.int32),
        )


def as_loss_scale(loss_scale: Any) -> LossScale:
    """Converts one of jmp's loss scales to a loss scale of this module.

    jmp's own objects lose `min_loss_scale` under jit, unscale in half precision and
    recompile per static value; their settings are taken over, their faults are not.
    Any other object with jmp's protocol is returned as it is.

    Raises:
      TypeError: if the object is not a loss scale.
    """
    if isinstance(loss_scale, jmp.NoOpLossScale):
        return NoOpLossScale()
    if isinstance(loss_scale, jmp.StaticLossScale):
        return StaticLossScale(loss_scale.loss_scale)
    if isinstance(loss_scale, jmp.DynamicLossScale):
        minimum = float(loss_scale.min_loss_scale)
        return DynamicLossScale(
            loss_scale.loss_scale,
            growth_interval=loss_scale.period,
            growth_factor=float(loss_scale.factor),
            backoff_factor=1 / float(loss_scale.factor),
            min_loss_scale=minimum,
            max_loss_scale=LARGEST_LOSS_SCALE,
            num_finite_steps=loss_scale.counter,
        )
    if isinstance(loss_scale, type) or not isinstance(loss_scale, LossScale):
        raise TypeError(
            "expected a loss scale (an object with loss_scale, scale, unscale and "
            f"adjust, such as mpjax.DynamicLossScale()), got {loss_scale!r}; a number "
            "goes into mpjax.StaticLossScale(number), a name such as 'dynamic' into "
            "mpjax.parse_loss_scale(name)."
        )
    return loss_scale


def parse_loss_scale(text: str) -> NoOpLossScale | StaticLossScale | DynamicLossScale:
    """Parses a loss scale from the text of a flag.

    Args:
      text: `none`, `static:128`, `dynamic`, `dynamic:32768`, or `dynamic` with settings
        by name: `dynamic:2**15,growth_interval=200,max_loss_scale=2**20`.

    Raises:
      ValueError: if the text is none of these, or a number is out of range.

    >>> float(parse_loss_scale("dynamic:2**10").loss_scale)
    1024.0
    """
    kind, _, rest = text.replace(" ", "").partition(":")
    parts = rest.split(",") if rest else []
    try:
        if kind == "none" and not parts:
            return NoOpLossScale()
        if kind == "static" and len(parts) == 1:
            return StaticLossScale(parse_number(parts[0]))
        if kind == "dynamic":
            settings = {}
            if parts and "=" not in parts[0]:
                settings["loss_scale"] = parse_number(parts.pop(0))
            for part in parts:
                name, _, value = part.partition("=")
                if name not in _SETTINGS:
                    raise ValueError(
                        f"no setting {name!r}; known: {', '.join(_SETTINGS)}"
                    )
                settings[name] = parse_number(value)
            return DynamicLossScale(**settings)
        raise ValueError("it is none of these")
    except ValueError as error:
        raise ValueError(
            f"cannot read loss scale {text!r}: {str(error).rstrip('.')}. Expected "
            "'none', 'static:128', "
            "'dynamic', 'dynamic:32768' or 'dynamic:32768,growth_interval=200'."
        ) from error


def scale_array(value: Any, low: float = 0.0, high: float = LARGEST_LOSS_SCALE) -> Any:
    """Returns a loss scale as a strongly typed float32 scalar; checks a known value.

    A number becomes a NumPy array, so that building a loss scale starts no backend.
    """
    if isinstance(value, jax.core.Tracer):
        return jax.lax.convert_element_type(value, np.float32)
    if isinstance(value, str):
        raise ValueError(
            f"loss_scale={value!r} must be a number; parse_loss_scale reads names."
        )
    number = np.asarray(value, np.float64)
    if number.shape != () or not 0 < number <= high or number < low:
        expected = f"must be a number above 0, and {high:g} at most."
        if (low, high) != (0.0, LARGEST_LOSS_SCALE):
            expected = (
                f"must be a number from {low:g} to {high:g}; choose another, or widen "
                "min_loss_scale and max_loss_scale."
            )
        raise ValueError(f"loss_scale={value} {expected}")
    if isinstance(value, jax.Array):
        return jax.lax.convert_element_type(value, np.float32)
    return number.astype(np.float32)


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


_SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(DynamicLossScale)  # pyright: ignore[reportArgumentType]
    if field.name not in ("loss_scale", "num_finite_steps", "hysteresis_left")
)
