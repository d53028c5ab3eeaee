"""Writes half matmuls in the form that XLA:CPU runs in bfloat16.

From JAX 0.11 on XLA:CPU runs a bfloat16 matmul in bfloat16 through a library that takes
`(M, K) x (K, N)` and `(M, K) x (N, K)`. It looks for these forms before it simplifies
anything, so it misses most other matmuls. If the one contracted axis stands elsewhere,
as in the gradient of a weight, it runs the matmul in float32. If it would transpose the
output, it accumulates in bfloat16, five times as slow as in float32. But a matmul with
two contracted axes, or two free axes, it first brings into the form of the library. So
matmuls get one more axis of length 1, which changes no value, and which XLA removes on
every device. The derivatives of such a matmul have the axis too.

A program that is partitioned over a mesh, be it of one device, goes through other
passes first, which undo these forms, and would accumulate in bfloat16. There a CPU
multiplies the same half numbers in float32.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._jaxpr.core import (
    MadeHalf,
    Var,
    call_eqn,
    count_uses,
    dtype_of,
    is_var,
    new_eqn,
    open_jaxpr,
    unit_axes_eqn,
    with_equations,
)
from mpjax._jaxpr.passes import map_equations, map_jaxprs
from mpjax._xla_cpu import switch

_BFLOAT16 = jnp.dtype(jnp.bfloat16)


def swap_transposed_matmuls(jaxpr: Any) -> Any:
    """Computes transposed matmuls directly, by exchanging their operands.

    Only matmuls that autocast made half (`MadeHalf`) are exchanged.

    The gradient of `x @ w` for `w` is traced as a transpose of a matmul. XLA folds the
    two, but not with the cast to half between them: every later pass over the gradient
    then reads it against its layout.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """
    return map_jaxprs(_swap, jaxpr) if switch.is_on else jaxpr


def add_unit_axes(jaxpr: Any) -> Any:
    """Writes matmuls that autocast made bfloat16 in the form that XLA:CPU runs so.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """

    def convert(eqn):
        if not isinstance(eqn.params, MadeHalf):
            return [eqn]
        if switch.is_partitioned(eqn):
            return in_float32_on_cpu(eqn)
        return with_unit_axes(eqn)

    return map_equations(convert, jaxpr) if switch.is_on else jaxpr


def with_unit_axes(dot: Any) -> list[Any]:
    """Returns equations for a matmul in the form that XLA:CPU runs in bfloat16.

    - `(M, K) x (N, K)` becomes `(1, M, K) x (N, K)`: it runs as before, and the
      gradient of its right operand contracts two axes.
    - `(M, K) x (K, N)` becomes `(1, 1, M, K) x (1, K, N)`, contracting one 1 and K:
      likewise, and XLA does not transpose that gradient.
    - Any other matmul in which not both operands contract their last axis contracts an
      axis of length 1 as well: `(K, M) x (K, N)` becomes `(1, K, M) x (1, K, N)`.

    The new axis that is not contracted is added only if the left operand has one free
    axis and no `out_sharding` names the axes of the output.

    Args:
      dot: an equation; unchanged unless it is a `dot_general` in bfloat16 with one
        contracted axis.
    """
    if dot.primitive.name != "dot_general" or not _is_bfloat16(dot):
        return [dot]
    if len(dot.params["dimension_numbers"][0][0]) != 1:
        return [dot]
    contract, batch = dot.params["dimension_numbers"]
    ndims = [len(x.aval.shape) for x in dot.invars]
    is_last = [axis == n - 1 for (axis,), n in zip(contract, ndims, strict=True)]
    adds_contracted_axis = not all(is_last)
    adds_free_axis = (
        is_last[0]
        and ndims[0] == len(batch[0]) + 2
        and dot.params.get("out_sharding") is None
    )
    num_new = (adds_free_axis + adds_contracted_axis, int(adds_contracted_axis))
    eqns: list[Any] = []
    operands: list[Any] = []
    for x, num in zip(dot.invars, num_new, strict=True):
        if num:
            eqns.append(unit_axes_eqn(x, num, dot))
        operands.append(eqns[-1].outvars[0] if num else x)
    if not eqns:
        return [dot]
    # The last new axis is contracted.
    contract = tuple(
        ((num - 1,) if adds_contracted_axis else ()) + _shifted(axes, num)
        for axes, num in zip(contract, num_new, strict=True)
    )
    batch = tuple(map(_shifted, batch, num_new))
    params = dot.params | {"dimension_numbers": (contract, batch)}
    if not adds_free_axis:
        return [*eqns, dot.replace(invars=operands, params=params)]
    out = dot.outvars[0]
    wide = new_eqn(dot.primitive, operands, params, like=dot, varies_as=out)
    squeezed = {"dimensions": (len(batch[0]),)}
    narrow = dot.replace(
        primitive=jax.lax.squeeze_p, invars=wide.outvars, params=squeezed
    )
    return [*eqns, wide, narrow]


def in_float32_on_cpu(dot: Any) -> list[Any]:
    """Returns equations for a matmul that a CPU computes in float32, and rounds.

    A CPU has no bfloat16 matmul with a float32 result; that is computed so, too.

    Args:
      dot: an equation; unchanged unless it is a `dot_general` of bfloat16 operands.
    """
    is_bfloat16 = {dtype_of(x) for x in dot.invars} == {_BFLOAT16}
    if dot.primitive.name != "dot_general" or not is_bfloat16:
        return [dot]
    out_dtype = dtype_of(dot.outvars[0])

    def half(x, y):
        return dot.primitive.bind(x, y, **dot.params)

    # If it is differentiated later, it saves the half operands alone.
    @jax.checkpoint
    def wide(x, y):
        params = dot.params | {"preferred_element_type": jnp.dtype(jnp.float32)}
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return dot.primitive.bind(x, y, **params).astype(out_dtype)

    def matmul(x, y):
        return jax.lax.platform_dependent(x, y, cpu=wide, default=half)

    return [call_eqn(matmul, dot.invars, dot.outvars, like=dot)]


def dot_general(
    x: jax.Array,
    y: jax.Array,
    dimension_numbers: Any,
    dtype: Any,
    precision: Any = None,
) -> jax.Array:
    """Multiplies two arrays, in float32 if it is on a CPU.

    XLA:CPU takes float8 operands, and adds up some of their products in half.

    Args:
      x: half or float8 array.
      y: likewise.
      dimension_numbers: as `jax.lax.dot_general` takes them.
      dtype: the dtype of the result.
      precision: on other devices, as `jax.lax.dot_general` takes it.
    """

    def multiply(x, y):
        return jax.lax.dot_general(
            x, y, dimension_numbers, precision, preferred_element_type=dtype
        )

    def wide(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jax.lax.dot_general(x, y, dimension_numbers).astype(dtype)

    if not switch.is_on:
        return multiply(x, y)
    return jax.lax.platform_dependent(x, y, cpu=wide, default=multiply)


def _is_bfloat16(dot: Any) -> bool:
    return {dtype_of(x) for x in (*dot.invars, *dot.outvars)} == {_BFLOAT16}


def _shifted(axes: tuple[int, ...], num: int) -> tuple[int, ...]:
    return tuple(axis + num for axis in axes)


def _swap(jaxpr: Any) -> Any:
    """Swaps the operands of transposed matmuls of one jaxpr, not inside it."""
    body = open_jaxpr(jaxpr)
    uses = count_uses(body)
    eqns: list[Any] = []
    dots: dict[Var, int] = {}  # The index of each matmul made half, by its result.
    for eqn in body.eqns:
        is_transpose = eqn.primitive.name == "transpose" and is_var(eqn.invars[0])
        index = dots.get(eqn.invars[0]) if is_transpose else None
        if index is not None and uses[eqn.invars[0]] == 1:
            swapped = _swapped(eqns[index], eqn)
            if swapped is not None:
                eqns[index] = None
                eqn = swapped
        if eqn.primitive.name == "dot_general" and isinstance(eqn.params, MadeHalf):
            dots[eqn.outvars[0]] = len(eqns)
        eqns.append(eqn)
    if None not in eqns:
        return jaxpr
    return with_equations(jaxpr, eqns=[eqn for eqn in eqns if eqn is not None])


def _swapped(dot: Any, transpose: Any) -> Any:
    """Returns a matmul that computes the transpose of another, or None."""
    if dot.params.get("out_sharding") is not None:
        return None
    contract, batch = dot.params["dimension_numbers"]
    num_batch = len(batch[0])
    num_free = [
        len(x.aval.shape) - num_batch - len(axes)
        for x, axes in zip(dot.invars, contract, strict=True)
    ]
    lhs = range(num_batch, num_batch + num_free[0])
    rhs = range(num_batch + num_free[0], num_batch + sum(num_free))
    if tuple(transpose.params["permutation"]) != (*range(num_batch), *rhs, *lhs):
        return None
    params = copy.copy(dot.params)  # A plain dict would not say who made them half.
    params["dimension_numbers"] = (contract[::-1], batch[::-1])
    return dot.replace(
        invars=dot.invars[::-1], outvars=transpose.outvars, params=params
    )
