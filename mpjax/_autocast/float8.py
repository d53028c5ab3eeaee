"""Float8 matmuls: which of them pay, how operands are rounded, and the derivative.

An operand is multiplied by a power of two and rounded to float8; the scale follows from
the operand's own largest magnitude, so there is no state to carry. Values take e4m3fn,
with three bits of fraction, and cotangents e5m2, with two bits and more range
(Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433). The matmul is
a `dot_general` of float8 operands; written as a matmul of operands that were rounded to
float8 and cast back to bfloat16, XLA would drop the rounding, and the speed with it.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpjax._jaxpr.core import is_split
from mpjax._xla_cpu.matmuls import dot_general
from mpjax.policy import Float8Policy

# FLOPs of a bfloat16 matmul in the time that a byte of memory takes: 989 TFLOP/s over
# 3.35 TB/s on an H100, 293 on a B200.
_FLOPS_PER_BYTE = 295
# Measuring an operand reads two bytes per number, rounding it reads two and writes one.
# Two of the three matmuls of a layer's forward and backward pass share that.
_BYTES_TO_QUANTIZE = 5 / 2

_FLOAT32 = jnp.dtype(jnp.float32)
_FRACTION_BITS = 23
_EXPONENT_BIAS = 127
# So that the scale and its inverse are both normal.
_SMALLEST_EXPONENT = -126


class Quantized(NamedTuple):
    """An array rounded to float8, about `values * 2**exponent`.

    Attributes:
      values: float8 array; NaN where the array is not finite.
      exponent: int32 scalar; for stacked arrays, one for each.
    """

    values: Any
    exponent: Any


class Matmul(NamedTuple):
    """What a matmul is besides its operands.

    Attributes:
      dimension_numbers: as `jax.lax.dot_general` takes them.
      dtype: the dtype of the result.
      all_sizes: whether its derivatives are float8 even where that does not pay.
    """

    dimension_numbers: Any
    dtype: Any
    all_sizes: bool


def why_not_float8(eqn: Any, *, all_sizes: bool) -> str:
    """Returns why a matmul or convolution stays in bfloat16, or an empty string.

    Args:
      eqn: the matmul or convolution.
      all_sizes: whether float8 is asked for even where it does not pay.
    """
    if eqn.primitive.name != "dot_general":
        return f"{eqn.primitive.name} has no float8 kernel"
    if any(map(is_split, (*eqn.invars, *eqn.outvars))):
        return "split over an explicit mesh"
    shapes = [x.aval.shape for x in eqn.invars]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return "of unknown size"
    if not all_sizes and not _pays(shapes, eqn.params["dimension_numbers"]):
        return "too small or narrow: to scale and round it takes longer than it saves"
    return ""


def quantize(
    x: Any, dtype: Any, axis_names: tuple[str, ...] = (), *, num_stacked: int = 0
) -> Quantized:
    """Rounds an array to float8, scaled so that its largest magnitude fits just so.

    Args:
      x: float32 or half array. Its derivative is zero.
      dtype: float8_e4m3fn or float8_e5m2.
      axis_names: the axes of a `shard_map` whose devices share the scale.
      num_stacked: number of first axes along which arrays are stacked, each with
        a scale of its own.
    """
    x = jax.lax.stop_gradient(x).astype(_FLOAT32)
    is_finite = jnp.isfinite(x)
    own_axes = tuple(range(num_stacked, x.ndim))
    largest = jnp.max(jnp.abs(jnp.where(is_finite, x, 0)), own_axes, initial=0)
    if axis_names:
        largest = jax.lax.pmax(largest, axis_names)
    exponent = _exponent(largest, dtype)
    # A cast clips Inf on some devices.
    inverse = jnp.expand_dims(_power_of_two(-exponent), own_axes)
    scaled = jnp.where(is_finite, x * inverse, jnp.nan)
    return Quantized(scaled.astype(dtype), exponent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float8_matmul(
    matmul: Matmul, x: Any, y: Any, x8: Quantized, y8: Quantized
) -> jax.Array:
    """Multiplies two arrays in float8.

    Args:
      matmul: what to compute.
      x: half array, which is differentiated and not read.
      y: likewise.
      x8: `x`, quantized.
      y8: `y`, quantized.

    Returns:
      The product. In a backward pass the cotangent is quantized, and multiplied in
      float8 with `x8` and `y8` if that pays or is asked for at all sizes, otherwise in
      half with `x` and `y`.
    """
    del x, y
    return _multiply(matmul, x8, y8)


def _forward(matmul: Matmul, x: Any, y: Any, x8: Quantized, y8: Quantized) -> Any:
    to_x, to_y = _pull_backs(matmul, x.shape, y.shape)
    halves = (None if to_y.is_float8 else x, None if to_x.is_float8 else y)
    return _multiply(matmul, x8, y8), (*halves, x8, y8)


def _backward(matmul: Matmul, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    x, y, x8, y8 = saved
    to_x, to_y = _pull_backs(matmul, x8.values.shape, y8.values.shape)
    g8: Any = None
    if to_x.is_float8 or to_y.is_float8:
        g8 = quantize(g, Float8Policy.cotangent_dtype, axes_to_share(jax.typeof(g)))
    gx = to_x((g8, y8)) if to_x.is_float8 else to_x((g, y))
    gy = to_y((x8, g8)) if to_y.is_float8 else to_y((x, g))
    return gx, gy, None, None


float8_matmul.defvjp(_forward, _backward)


def axes_to_share(aval: Any) -> tuple[str, ...]:
    """Returns the axes of a `shard_map` over which the parts of an array are spread.

    Where `shard_map` does not keep track of that, they are all its axes.

    Args:
      aval: the type of the part that one device holds.
    """
    mesh = aval.sharding.mesh
    return tuple(sorted(aval.manual_axis_type.varying)) or tuple(mesh.manual_axes)


def _multiply(matmul: Matmul, x8: Quantized, y8: Quantized) -> jax.Array:
    # Without XLA's fast accumulation, which adds up float8 products in fewer bits.
    precision = jax.lax.Precision.HIGHEST
    numbers, dtype, _ = matmul
    product = dot_general(x8.values, y8.values, numbers, dtype, precision=precision)
    # Each half of the power is a normal number; the whole may not be.
    exponent = x8.exponent + y8.exponent
    first = exponent >> 1
    for part in (first, exponent - first):
        product *= _power_of_two(part).astype(product.dtype)
    return product


def _multiply_in_half(matmul: Matmul, x: jax.Array, y: jax.Array) -> jax.Array:
    numbers, dtype, _ = matmul
    return dot_general(x.astype(dtype), y.astype(dtype), numbers, dtype)


def _exponent(largest: jax.Array, dtype: Any) -> jax.Array:
    """Returns the smallest exponent at which a number still fits into a float8 format.

    Args:
      largest: float32 scalar, 0 or more, and finite.
      dtype: of the format, whose largest number is 1.75 times a power of two.
    """
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    # What is larger than 1.75 times a power of two counts as the next power.
    bits += (1 << (_FRACTION_BITS - 2)) - 1
    own = (bits >> _FRACTION_BITS) - _EXPONENT_BIAS
    _, largest_exponent = math.frexp(float(jnp.finfo(dtype).max))
    return jnp.maximum(own - (largest_exponent - 1), _SMALLEST_EXPONENT)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns a float32 power of two, exactly; it must be normal."""
    bits = (exponent + _EXPONENT_BIAS) << _FRACTION_BITS
    return jax.lax.bitcast_convert_type(bits, _FLOAT32)


class _PullBack(NamedTuple):
    """The matmul that gives the gradient of one operand from the other's.

    Attributes:
      matmul: its operands are the cotangent, in place of the one operand, and the
        other.
      permutation: of the axes of its result, for those of the gradient.
      is_float8: whether it runs in float8.
    """

    matmul: Matmul
    permutation: list[int]
    is_float8: bool

    def __call__(self, operands: tuple[Any, Any]) -> jax.Array:
        multiply = _multiply if self.is_float8 else _multiply_in_half
        return multiply(self.matmul, *operands).transpose(self.permutation)


def _pull_backs(matmul: Matmul, *shapes: tuple[int, ...]) -> tuple[_PullBack, ...]:
    """Returns how to compute the gradients of the left and of the right operand."""
    contract, batch = matmul.dimension_numbers
    free = [
        [axis for axis in range(len(shape)) if axis not in (*contract[i], *batch[i])]
        for i, shape in enumerate(shapes)
    ]
    # The axes of the cotangent: batch, and the free axes of both operands.
    g_batch = list(range(len(batch[0])))
    ends = len(g_batch), len(g_batch) + len(free[0])
    g_free = list(range(*ends)), list(range(ends[1], ends[1] + len(free[1])))
    sizes = [shapes[0][axis] for axis in (*batch[0], *free[0])]
    g_shape = (*sizes, *(shapes[1][axis] for axis in free[1]))
    dtype = jnp.dtype(Float8Policy.compute_dtype)
    found = []
    for index, other in ((0, 1), (1, 0)):
        # What remains of the other operand is contracted with this one.
        pairs = sorted(zip(contract[other], contract[index], strict=True))
        remaining = [own for _, own in pairs]
        contracted, batched = [g_free[other], free[other]], [g_batch, batch[other]]
        operands = [g_shape, shapes[other]]
        axes = [*batch[index], *free[index], *remaining]
        if index == 1:
            axes = [*batch[index], *remaining, *free[index]]
            contracted, batched = contracted[::-1], batched[::-1]
            operands = operands[::-1]
        numbers = (tuple(map(tuple, contracted)), tuple(map(tuple, batched)))
        found.append(
            _PullBack(
                matmul._replace(dimension_numbers=numbers, dtype=dtype),
                [axes.index(axis) for axis in range(len(axes))],
                matmul.all_sizes or _pays(operands, numbers),
            )
        )
    return tuple(found)


def _pays(shapes: Any, dimension_numbers: Any) -> bool:
    """Whether a matmul is faster in float8 by the roofline of an H100.

    Time is counted in the bytes that memory moves in it. A matmul takes as long as its
    arithmetic or its traffic, whichever is longer; in float8 the arithmetic takes half,
    operands are half as large, and there is the time to measure and to round them.

    Args:
      shapes: those of both operands.
      dimension_numbers: as `jax.lax.dot_general` takes them.
    """
    x, y = shapes
    (contract, contract_y), (_, batch_y) = dimension_numbers
    left = [n for axis, n in enumerate(y) if axis not in (*contract_y, *batch_y)]
    num_contracted = math.prod(x[axis] for axis in contract)
    operands = math.prod(x) + math.prod(y)
    results = math.prod(x) // max(num_contracted, 1) * math.prod(left)
    arithmetic = 2 * results * num_contracted / _FLOPS_PER_BYTE
    in_half = max(arithmetic, 2 * operands + 2 * results)
    in_float8 = max(arithmetic / 2, operands + 2 * results)
    return in_float8 + _BYTES_TO_QUANTIZE * operands < in_half
