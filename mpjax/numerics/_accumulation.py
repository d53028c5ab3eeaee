"""What adds many numbers up, and in which dtype."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._jaxpr.core import inner_jaxprs, open_jaxpr
from mpjax.numerics._flow import Value

_CUMULATIVE = ("cumsum", "cumprod", "cumlogsumexp")
_SUMS = ("add", "sub", "add_any")


def is_half(dtype: Any) -> bool:
    """Whether a dtype is float16 or bfloat16."""
    return dtype in (np.float16, jnp.bfloat16)


def accumulated(eqn: Any, values: list[Value], out: Value) -> Any:
    """Returns `(carried, site)` if an op adds something independent to a carried value.

    A value that is added to itself changed, `x + f(x)`, is a residual or a recurrence.
    """
    name = eqn.primitive.name
    if name == "select_n":
        found = {v.accumulated or (v.carried, None) for v in values[1:]}
        totals = {x for x in found if x[1]}
        return totals.pop() if totals and len({x[0] for x in found}) == 1 else None
    if name not in _SUMS:
        return None
    pairs = [(values[0], values[1])]
    pairs += [] if name == "sub" else [(values[1], values[0])]
    for total, term in pairs:
        carried = total.accumulated[0] if total.accumulated else total.carried
        if carried is not None and carried not in term.depends_on:
            return carried, out.site
    return None


def num_terms(eqn: Any) -> int:
    """Returns how many numbers an operation adds up, or multiplies, into one."""
    name = eqn.primitive.name
    shape: Any = eqn.invars[0].aval.shape if eqn.invars else ()
    if name in ("reduce_sum", "reduce_prod") or (
        name == "reduce" and _is_sum(eqn.params["jaxpr"])
    ):
        return math.prod(shape) // max(math.prod(eqn.outvars[0].aval.shape), 1)
    if name in _CUMULATIVE:
        return shape[eqn.params["axis"]]
    if name == "reduce_window_sum" or (
        name == "reduce_window" and any(map(_is_sum, inner_jaxprs(eqn)))
    ):
        return math.prod(eqn.params["window_dimensions"])
    if name == "scatter-add" and not eqn.params["unique_indices"]:
        batched = eqn.params["dimension_numbers"].scatter_indices_batching_dims
        sizes: tuple[int, ...] = eqn.invars[1].aval.shape[:-1]
        return math.prod(n for i, n in enumerate(sizes) if i not in batched)
    return 0


def accumulates_in_half(eqn: Any) -> bool:
    """Whether a matmul asks for an algorithm that accumulates in half."""
    precision = eqn.params.get("precision")
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        return is_half(precision.accumulation_type)
    if isinstance(precision, jax.lax.DotAlgorithm):
        return is_half(precision.accumulation_type)
    return False


def _is_sum(jaxpr: Any) -> bool:
    names = [e.primitive.name for e in open_jaxpr(jaxpr).eqns]
    return any(name in ("add", "mul") for name in names)
