"""Where results of half matmuls go: into differences of near equals, into decisions.

A half matmul rounds its results. Most of what follows does not mind; two things do. A
sum of squares less twice a product, the squared distance `a² + b² - 2ab`, is a
difference of nearly equal numbers, so that little else than the rounding is left. And
where results are ranked (`top_k`, `argmax`, `sort`), rounding decides between those
that are close.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mpjax._jaxpr.core import is_inexact_aval
from mpjax._jaxpr.primitives import Facts, Kind, facts_of
from mpjax._tree import is_half


class Difference(NamedTuple):
    """A sum or difference in which the result of a half matmul takes part.

    Attributes:
      eqn: the equation.
      matmul: the site of the matmul.
    """

    eqn: Any
    matmul: Any


class Decision(NamedTuple):
    """A choice by order, from results of a half matmul.

    Attributes:
      site: the site of the `top_k`, `argmax` or `sort`.
      matmul: the site of the matmul.
      times: how often it is made.
      eqn: its equation.
    """

    site: Any
    matmul: Any
    times: int
    eqn: Any


@dataclasses.dataclass(frozen=True)
class History:
    """What a value was made of.

    Attributes:
      origin: identifies the array that it is, moved or cast; None if unknown.
      squares: origins of the arrays whose squares it is a sum of, among others.
      factors: origins of the operands of the half matmul that it holds.
      matmul: site of that matmul; None if it holds no result of one.
      difference: the last `Difference` that it was made by.
      decision: the `Decision` that it is the result of.
      is_spread: whether a decision was broadcast along a new axis, as for a mask.
      is_random: whether it holds random numbers.
    """

    origin: Any = None
    squares: frozenset = frozenset()
    factors: frozenset = frozenset()
    matmul: Any = None
    difference: Difference | None = None
    decision: Decision | None = None
    is_spread: bool = False
    is_random: bool = False

    def join(self, other: "History") -> "History":
        """Returns the history of a value that may have either of two."""
        return History(
            origin=self.origin if self.origin == other.origin else None,
            squares=self.squares & other.squares,
            factors=self.factors & other.factors,
            matmul=self.matmul or other.matmul,
            difference=self.difference or other.difference,
            decision=self.decision or other.decision,
            is_spread=self.is_spread or other.is_spread,
            is_random=self.is_random or other.is_random,
        )


UNKNOWN = History()


def follow(eqn: Any, histories: list[History], site: Any, times: int) -> History:
    """Returns the history of an equation's results from those of its operands.

    Args:
      eqn: an operation, not a call or loop.
      histories: one per operand.
      site: the site of the equation.
      times: how often it runs.
    """
    facts, name = facts_of(eqn), eqn.primitive.name
    if not histories or not eqn.outvars:
        return History(origin=id(eqn))
    first = histories[0]
    if name == "convert_element_type" or facts.moves_data:
        grows = eqn.outvars[0].aval.size > eqn.invars[0].aval.size
        return dataclasses.replace(first, is_spread=first.is_spread or grows)
    new = History(
        origin=id(eqn),
        is_random=_is_random(eqn, histories, facts),
        decision=_decision(eqn, histories, facts, site, times),
        is_spread=any(h.is_spread for h in histories),
    )
    if not is_inexact_aval(eqn.outvars[0].aval):
        return new
    if facts.is_matmul:
        return _of_matmul(eqn, histories, new, site)
    if name == "reduce_sum":
        return dataclasses.replace(new, squares=first.squares)
    if _is_elementwise(facts):
        return _of_elementwise(eqn, histories, new, facts)
    return new


def cancelled(eqn: Any, histories: list[History]) -> History | None:
    """Returns the history of the half product in a squared distance, or None."""
    if not facts_of(eqn).is_addition:
        return None
    a, b = histories
    return b if a.squares & b.factors else a if b.squares & a.factors else None


def decided(
    eqn: Any, histories: list[History], are_constant: list[bool]
) -> Decision | None:
    """Returns the decision that an equation acts upon, or None.

    It does if it reads or writes by an index, or if a mask meets other numbers.

    Args:
      eqn: an operation.
      histories: one per operand.
      are_constant: whether each operand depends on no floating argument.
    """
    facts = facts_of(eqn)
    indexes = facts.is_slice or facts.reduces_by_jaxpr
    for history in histories:
        if history.decision is not None:
            meets = any(
                is_inexact_aval(x.aval) and h.decision is None and not is_constant
                for x, h, is_constant in zip(
                    eqn.invars, histories, are_constant, strict=True
                )
            )
            if indexes or meets:
                return history.decision
    return None


def _decision(
    eqn: Any, histories: list[History], facts: Facts, site: Any, times: int
) -> Decision | None:
    if facts.ranks:
        keys = eqn.params.get("num_keys", 1)
        is_choice = eqn.primitive.name != "sort" or len(eqn.invars) > 1
        for history in histories[:keys]:
            if is_choice and history.matmul is not None:
                return Decision(site, history.matmul, times, eqn)
    for x, history in zip(eqn.invars, histories, strict=True):
        # A comparison with labels is a metric; one along a new axis makes a mask.
        is_spread = history.is_spread or eqn.outvars[0].aval.size > x.aval.size
        if history.decision is not None and (is_spread or not facts.tests_equality):
            return history.decision
    return None


def _is_random(eqn: Any, histories: list[History], facts: Facts) -> bool:
    """Whether results are noise: random numbers, and what is made of them alone.

    A product with noise is noise; a sum is, if but for numbers in the code all of it
    is. A matmul's result is not.
    """
    if eqn.primitive.name.startswith("random_"):
        return True
    if facts.is_matmul or not any(h.is_random for h in histories):
        return False
    return not facts.is_addition or all(
        h.is_random or h.origin is None for h in histories
    )


def _of_matmul(eqn: Any, histories: list[History], new: History, site: Any) -> History:
    operands = [h.origin for h in histories[:2]]
    if eqn.primitive.name == "dot_general":
        (_, _), (batch, _) = eqn.params["dimension_numbers"]
        is_scalar_product = eqn.outvars[0].aval.ndim == len(batch)
        if is_scalar_product and operands[0] is not None and len({*operands}) == 1:
            return dataclasses.replace(new, squares=frozenset(operands))
    if not any(is_half(x.aval) for x in (*eqn.invars, *eqn.outvars)):
        return new
    factors = frozenset(x for x in operands if x is not None)
    return dataclasses.replace(new, matmul=site, factors=factors)


def _is_elementwise(facts: Facts) -> bool:
    return facts.kind in (Kind.PROMOTE, Kind.FLOAT32) and not (
        facts.sums_axes or facts.accumulates or facts.is_slice or facts.shrinks
    )


def _of_elementwise(
    eqn: Any, histories: list[History], new: History, facts: Facts
) -> History:
    name = eqn.primitive.name
    matmul = next((h.matmul for h in histories if h.matmul is not None), None)
    difference = next((h.difference for h in histories if h.difference), None)
    if facts.is_addition:
        if matmul is not None:
            difference = Difference(eqn, matmul)
        # Noise makes the choice random anyway.
        matmul = None if any(h.is_random for h in histories) else matmul
    squares = factors = frozenset()
    origins = {h.origin for h in histories}
    is_square = name == "square" or (name == "integer_pow" and eqn.params["y"] == 2)
    if is_square or (name == "mul" and len(origins) == 1):
        squares = histories[0].squares or frozenset(origins - {None})
    elif facts.is_addition or name == "sqrt" or _is_scaling(eqn, facts):
        squares = frozenset().union(*(h.squares for h in histories))
        factors = frozenset().union(*(h.factors for h in histories))
    if cancelled(eqn, histories) is not None:
        factors = frozenset()  # Said once.
    return dataclasses.replace(
        new, matmul=matmul, difference=difference, squares=squares, factors=factors
    )


def _is_scaling(eqn: Any, facts: Facts) -> bool:
    """Whether it multiplies or divides an array by one number, or negates it."""
    sizes = sorted(x.aval.size for x in eqn.invars)
    return facts.is_proportional and all(size == 1 for size in sizes[:-1])


def is_below_zero_by_rounding(operands: list[Any], result: Any) -> bool:
    """Whether a sum or difference falls below zero, and nowhere by more than rounding.

    Args:
      operands: its two operands, one of which a half matmul rounded.
      result: its result.
    """
    a, b = (np.abs(np.asarray(x, np.float64)) for x in operands)
    result = np.asarray(result, np.float64)
    bound = 4 * float(jnp.finfo(jnp.bfloat16).eps) * np.maximum(a, b)
    is_negative = result < 0
    is_small = -result[is_negative] <= bound[is_negative]
    return bool(np.any(is_negative) and np.all(is_small))
