"""What a scan stacks up for later, and what of that may be stacked up in half.

Most of it is kept for the backward pass, another scan, which multiplies by it: rounded,
each gradient is off by no more than one rounding of a factor. Anything that is added,
compared, or goes through another function there stays as it is.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mpjax._jaxpr import (
    Literal,
    inner_jaxprs,
    is_float32,
    join_scope,
    open_jaxpr,
    scan_sizes,
)
from mpjax.autocast._tables import ACTIVATION, EXACT, FREE, Kind

_KEEPS_BOUNDED = EXACT | {"one_minus_square", "mul", "sub"}


def first_stacked_operand(scan: Any) -> int:
    """Returns the index of the first operand that is taken apart, one piece a step."""
    return sum(scan_sizes(scan))


def result_dtypes(
    scan: Any,
    dtypes: Sequence[Any],
    wish_of: Callable[[Any], Any],
    factors: frozenset,
    half: Any,
) -> tuple[Any, ...]:
    """Returns in what dtype each result of a scan had better come.

    Args:
      scan: the equation.
      dtypes: of the results by now.
      wish_of: what those who take a result want.
      factors: variables that are `only_multiplied`.
      half: the dtype that matmuls have here; None for float32.
    """
    found = list(dtypes)
    bounded = bounded_results(scan.params["jaxpr"])
    _, num_carried = scan_sizes(scan)
    for index, var in enumerate(scan.outvars):
        if index < num_carried or not is_float32(var.aval):
            continue
        fits = bounded[index] or half != np.float16
        is_kept = var in factors and fits and half is not None
        found[index] = wish_of(var).only_half() or (half if is_kept else found[index])
    return tuple(found)


def only_multiplied(body: Any, scope: str, rewriter: Any) -> frozenset:
    """Returns the variables of a jaxpr that only scans take, which multiply by them.

    Args:
      body: an open jaxpr.
      scope: its name scope.
      rewriter: the `Rewriter`, which knows what is done with each equation.
    """
    found, others = set(), set(_variables(body.outvars))
    for eqn in body.eqns:
        factors = frozenset()
        if eqn.primitive.name == "scan" and rewriter.kind_of(eqn) is Kind.FIXED:
            factors = _factors(eqn, join_scope(scope, eqn), rewriter.multiplies_in_half)
        found.update(_variables(eqn.invars[i] for i in factors))
        rest = (x for i, x in enumerate(eqn.invars) if i not in factors)
        others.update(_variables(rest))
    return frozenset(found - others)


def _factors(
    scan: Any, scope: str, multiplies: Callable[[Any, str], bool]
) -> frozenset[int]:
    """Returns the operands that its body only multiplies by, a piece each step."""
    body = open_jaxpr(scan.params["jaxpr"])
    others = set(_variables(body.outvars))
    for eqn in body.eqns:
        if not multiplies(eqn, scope):
            others.update(_variables(eqn.invars))
    start = first_stacked_operand(scan)
    pieces = enumerate(body.invars[start:], start)
    return frozenset(i for i, v in pieces if v not in others and is_float32(v.aval))


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [x for x in atoms if not isinstance(x, Literal)]


def bounded_results(jaxpr: Any, are_bounded: Sequence[bool] = ()) -> list[bool]:
    """Tells which results are made of saturating functions, and so fit in float16.

    Args:
      jaxpr: closed or open.
      are_bounded: the same of its inputs; of none if empty.
    """
    body = open_jaxpr(jaxpr)
    known = {v for v, is_so in zip(body.invars, are_bounded, strict=False) if is_so}

    def is_bounded(atom):
        if isinstance(atom, Literal):
            return np.ndim(atom.val) == 0 and abs(float(atom.val)) <= 1
        return atom in known

    for eqn in body.eqns:
        name, inner = eqn.primitive.name, inner_jaxprs(eqn)
        operands = [is_bounded(x) for x in eqn.invars]
        if name in ACTIVATION or (name in _KEEPS_BOUNDED and all(operands)):
            known.update(eqn.outvars)
        elif name in FREE and len(inner) == 1:
            results = bounded_results(inner[0], operands)
            pairs = zip(eqn.outvars, results, strict=True)
            known.update(v for v, is_so in pairs if is_so)
    return [is_bounded(x) for x in body.outvars]
