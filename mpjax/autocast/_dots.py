"""The form in which a half matmul is written: what XLA makes of it depends on it."""

from typing import Any

import jax.numpy as jnp

from mpjax import _jaxpr
from mpjax._jaxpr import dtype_of

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


def contract_unit_axis(dot: Any) -> list[Any]:
    """Returns equations for a matmul that contracts an axis of one as well.

    That changes nothing of its value, and XLA takes the axis away. But XLA:CPU (from
    JAX 0.11 on) looks at a bfloat16 matmul before it does so. One of a single
    contracted axis that does not stand where its library wants it, such as the gradient
    of every weight, it runs in float32, or accumulates in bfloat16; one that contracts
    two axes it first brings into the form of the library. So do the matmuls that
    JAX derives from this one. Measured: a weight's gradient 1.6 to 8 times as fast, and
    that of a layer over (B, T, D) vectors ten times as accurate; never slower.

    Args:
      dot: a `dot_general` equation.
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dot.params[
        "dimension_numbers"
    ]
    is_bfloat16 = {dtype_of(x) for x in (*dot.invars, *dot.outvars)} == {_BFLOAT16}
    if not is_bfloat16 or len(lhs_contract) != 1:
        return [dot]
    numbers = (
        ((0, lhs_contract[0] + 1), (0, rhs_contract[0] + 1)),
        (_moved(lhs_batch), _moved(rhs_batch)),
    )
    lhs, rhs = (_jaxpr.unit_axis_eqn(x, dot) for x in dot.invars)
    wider = dot.replace(
        invars=[lhs.outvars[0], rhs.outvars[0]],
        params=dot.params | {"dimension_numbers": numbers},
    )
    return [lhs, rhs, wider]


def _moved(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis + 1 for axis in axes)
