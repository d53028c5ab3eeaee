"""The form in which a half matmul is written: what XLA makes of it depends on it.

XLA:CPU (from JAX 0.11 on) runs a bfloat16 matmul in bfloat16 by a library that takes
`(M, K) x (K, N)` and `(M, K) x (N, K)`. It asks for that form before it has simplified
anything, so it misses most others: a matmul of one contracted axis that stands
elsewhere, such as the gradient of a weight, it runs in float32; one whose output it
would transpose it accumulates in bfloat16, five times as slow as in float32. But
a matmul of two contracted axes, or two free ones, it first brings into the form of the
library. So matmuls get an axis of one more, which changes nothing of their value, and
which XLA takes away on every device. What JAX derives from such a matmul has it too.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mpjax._jaxpr import core as _jaxpr
from mpjax._jaxpr.core import dtype_of
from mpjax._jaxpr.primitives import facts_of

_BFLOAT16 = jnp.dtype(jnp.bfloat16)


def swaps_operands(dot: Any, permutation: tuple[int, ...]) -> bool:
    """Whether transposing a matmul's output so is to exchange its operands."""
    if dot.params.get("out_sharding") is not None:
        return False
    (lhs_contract, rhs_contract), (batch, _) = dot.params["dimension_numbers"]
    num_batch = len(batch)
    num_lhs = len(dot.invars[0].aval.shape) - num_batch - len(lhs_contract)
    num_rhs = len(dot.invars[1].aval.shape) - num_batch - len(rhs_contract)
    lhs = range(num_batch, num_batch + num_lhs)
    rhs = range(num_batch + num_lhs, num_batch + num_lhs + num_rhs)
    return tuple(permutation) == (*range(num_batch), *rhs, *lhs)


def with_unit_axes(dot: Any) -> list[Any]:
    """Returns equations for a matmul in the form that XLA:CPU runs in bfloat16.

    - `(M, K) x (N, K)` becomes `(1, M, K) x (N, K)`: it is run as it was, and the
      gradient of its right operand contracts two axes.
    - `(M, K) x (K, N)` becomes `(1, 1, M, K) x (1, K, N)`, contracting one 1 and K:
      so too, and XLA does not transpose that gradient.
    - Any other of which not both operands contract their last axis contracts an axis of
      1 beside its own: `(K, M) x (K, N)` becomes `(1, K, M) x (1, K, N)`.

    The 1 that is not contracted is there only where the left operand has one free axis,
    and no `out_sharding` names those of the output.

    Args:
      dot: a `dot_general` equation; none is changed but in bfloat16 with one contracted
        axis.
    """
    contract, batch = dot.params["dimension_numbers"]
    is_bfloat16 = {dtype_of(x) for x in (*dot.invars, *dot.outvars)} == {_BFLOAT16}
    if not is_bfloat16 or len(contract[0]) != 1:
        return [dot]
    ndims = [len(x.aval.shape) for x in dot.invars]
    is_last = [axis == n - 1 for (axis,), n in zip(contract, ndims, strict=True)]
    contracts_one = not all(is_last)
    has_free_one = (
        is_last[0]
        and ndims[0] == len(batch[0]) + 2
        and dot.params.get("out_sharding") is None
    )
    num_new = (has_free_one + contracts_one, int(contracts_one))
    eqns: list[Any] = []
    operands: list[Any] = []
    for x, num in zip(dot.invars, num_new, strict=True):
        if num:
            eqns.append(_jaxpr.unit_axes_eqn(x, num, dot))
        operands.append(eqns[-1].outvars[0] if num else x)
    # The last of the new axes is the one that is contracted.
    contract = tuple(
        ((num - 1,) if contracts_one else ()) + _moved(axes, num)
        for axes, num in zip(contract, num_new, strict=True)
    )
    batch = tuple(map(_moved, batch, num_new))
    params = dot.params | {"dimension_numbers": (contract, batch)}
    if not has_free_one:
        return [*eqns, dot.replace(invars=operands, params=params)]
    out = dot.outvars[0]
    wide = _jaxpr.new_eqn(dot.primitive, operands, params, like=dot, varies_as=out)
    squeezed = {"dimensions": (len(batch[0]),)}
    narrow = dot.replace(
        primitive=jax.lax.squeeze_p, invars=wide.outvars, params=squeezed
    )
    return [*eqns, wide, narrow]


def _moved(axes: tuple[int, ...], num: int) -> tuple[int, ...]:
    return tuple(axis + num for axis in axes)


def low_outputs(eqn: Any, dtype: Any) -> list[Any]:
    """Returns the dtypes that a matmul, or a primitive of the user's, puts out."""
    if facts_of(eqn).is_matmul:
        return [dtype]
    operands = [jax.ShapeDtypeStruct(x.aval.shape, dtype_of(x)) for x in eqn.invars]
    outputs = jax.eval_shape(lambda *xs: _jaxpr.bind(eqn, *xs), *operands)
    return [x.dtype for x in outputs]
