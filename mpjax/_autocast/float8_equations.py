"""The equations of float8 matmuls, and of the quantizing before them."""

import functools
from typing import Any

import jax

from mpjax._autocast.float8 import (
    Matmul,
    Quantized,
    axes_to_share,
    float8_matmul,
    quantize,
)
from mpjax._jaxpr.core import (
    Var,
    dtype_of,
    from_source_of,
    map_inner_jaxprs,
    trace_call,
)
from mpjax._jaxpr.provenance import FLOAT8_MATMUL


class MadeFloat8Call(dict):
    """Parameters of a call of `float8_matmul`, which know what it multiplies."""

    def __init__(self, params: Any, matmul: Matmul):
        super().__init__(params)
        self.matmul = matmul


def quantize_eqn(x: Var, dtype: Any, num_stacked: int, like: Any) -> Any:
    """Returns the equation that quantizes a variable; its results are a `Quantized`.

    Args:
      x: half or float32.
      dtype: a float8 dtype.
      num_stacked: as in `quantize`.
      like: equation whose source line and context it takes.
    """
    call = _trace_quantize(x.aval, dtype, num_stacked, like.ctx)
    values, exponent = (Var(v.aval) for v in call.outvars)
    return call.replace(
        invars=[x],
        outvars=[values, exponent],
        params=map_inner_jaxprs(lambda x: from_source_of(like, x), call.params),
        source_info=like.source_info,
    )


def matmul_eqn(call: Any, matmul: Matmul, out: Var) -> Any:
    """Returns the equation of a float8 matmul.

    Args:
      call: equation whose operands, source line and context it takes.
      matmul: what it computes.
      out: its result.
    """
    avals = tuple(x.aval for x in call.invars)
    traced = _trace_matmul(avals, matmul, call.ctx)
    params = map_inner_jaxprs(lambda x: from_source_of(call, x), traced.params)
    return traced.replace(
        invars=call.invars,
        outvars=[out],
        params=MadeFloat8Call(params, matmul),
        source_info=call.source_info,
    )


def with_float32_result(eqn: Any, out: Var) -> Any:
    """Returns a float8 matmul with another result, in float32.

    Args:
      eqn: an equation whose parameters are a `MadeFloat8Call`.
      out: float32 variable.
    """
    return matmul_eqn(eqn, eqn.params.matmul._replace(dtype=dtype_of(out)), out)


@functools.lru_cache(maxsize=1024)
def _trace_quantize(aval: Any, dtype: Any, num_stacked: int, context: Any) -> Any:
    axes = axes_to_share(aval)

    def quantize_float8(x):
        return quantize(x, dtype, axes, num_stacked=num_stacked)

    return trace_call(jax.jit(quantize_float8), [aval], context)


@functools.lru_cache(maxsize=1024)
def _trace_matmul(avals: Any, matmul: Matmul, context: Any) -> Any:
    def multiply(x, y, *quantized):
        x8, y8 = Quantized(*quantized[:2]), Quantized(*quantized[2:])
        return float8_matmul(matmul, x, y, x8, y8)

    multiply.__name__ = multiply.__qualname__ = FLOAT8_MATMUL
    return trace_call(jax.jit(multiply), avals, context)
