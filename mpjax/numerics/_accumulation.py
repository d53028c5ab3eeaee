"""Which operations add many numbers up, and in which dtype."""

import math
from typing import Any

import jax

from mpjax._jaxpr.core import inner_jaxprs, open_jaxpr
from mpjax._jaxpr.primitives import facts_of
from mpjax._tree import is_half
from mpjax.numerics._flow import AbstractValue


def accumulated(eqn: Any, values: list[AbstractValue], out: AbstractValue) -> Any:
    """Returns `(carried, site)` if an op adds an independent term to a carried value.

    In `x + f(x)` the term is not independent: that is a residual connection or
    a recurrence.
    """
    if eqn.primitive.name == "select_n":
        found = {v.accumulated or (v.carried, None) for v in values[1:]}
        totals = {x for x in found if x[1]}
        return totals.pop() if totals and len({x[0] for x in found}) == 1 else None
    if not facts_of(eqn).is_addition:
        return None
    pairs = [(values[0], values[1])]
    pairs += [] if eqn.primitive.name == "sub" else [(values[1], values[0])]
    for total, term in pairs:
        carried = total.accumulated[0] if total.accumulated else total.carried
        if carried is not None and carried not in term.depends_on:
            return carried, out.site
    return None


def num_terms(eqn: Any) -> int:
    """Returns how many numbers an operation adds up, or multiplies, into one.

    0 for an operation that does neither.
    """
    name, facts = eqn.primitive.name, facts_of(eqn)
    shape: Any = eqn.invars[0].aval.shape if eqn.invars else ()
    reduces = facts.reduces_by_jaxpr and any(map(_adds_up, inner_jaxprs(eqn)))
    if facts.sums_axes or (name == "reduce" and reduces):
        return math.prod(shape) // max(math.prod(eqn.outvars[0].aval.shape), 1)
    if facts.accumulates:
        return shape[eqn.params["axis"]]
    if name == "reduce_window_sum" or (name == "reduce_window" and reduces):
        return math.prod(eqn.params["window_dimensions"])
    if name == "scatter-add" and not eqn.params["unique_indices"]:
        batched = eqn.params["dimension_numbers"].scatter_indices_batching_dims
        sizes: tuple[int, ...] = eqn.invars[1].aval.shape[:-1]
        return math.prod(n for i, n in enumerate(sizes) if i not in batched)
    return 0


def accumulates_in_half(eqn: Any) -> bool:
    """Whether a matmul asks for an algorithm that accumulates in half."""
    algorithm = eqn.params.get("precision")
    kinds = (jax.lax.DotAlgorithmPreset, jax.lax.DotAlgorithm)
    return isinstance(algorithm, kinds) and is_half(algorithm.accumulation_type)


def _adds_up(jaxpr: Any) -> bool:
    """Whether the scalar function of a reduction adds, or multiplies."""
    return any(
        facts_of(eqn).is_addition or eqn.primitive.name == "mul"
        for eqn in open_jaxpr(jaxpr).eqns
    )
