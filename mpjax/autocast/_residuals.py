"""What a scan keeps for its backward pass, and what of that may be kept in half.

JAX differentiates a scan into two: the first stacks up, step by step, what the second,
which runs backward, multiplies by. What only matmuls take there may be half and loses
nothing. A factor of a cotangent may be half where its error does not compound: the
gradient is then off by one rounding, as by a matmul's operand.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpjax._jaxpr import (
    Literal,
    inner_jaxprs,
    is_float32,
    join_scope,
    open_jaxpr,
    scan_sizes,
    transforms,
)
from mpjax.autocast._tables import ACTIVATION, EXACT, FREE, Kind

_ADDITIVE = EXACT | {"add", "add_any", "sub"}
_KEEPS_BOUNDED = EXACT | {"one_minus_square", "mul", "sub"}


class Decisions(NamedTuple):
    """What a `Rewriter` decides of single equations.

    Attributes:
      kind_of: the kind of an equation.
      low_dtype: `(eqn, scope) -> half dtype`, or None if a matmul stays in float32.
      half_of: `scope -> half dtype` of the policy there, or None if it has none.
    """

    kind_of: Callable[[Any], Kind]
    low_dtype: Callable[[Any, str], Any]
    half_of: Callable[[str], Any]


class _Op(NamedTuple):
    """An equation at any depth of calls, its operands and results by identity."""

    eqn: Any
    scope: str
    ins: list[object]
    outs: list[object]


def differentiated_scans(jaxpr: Any, around: str = "") -> dict[int, bool]:
    """Returns which scan equations, by id, JAX made as it differentiated one.

    Args:
      jaxpr: closed or open.
      around: the transforms around it.

    Returns:
      For each whether it runs backward.
    """
    found = {}
    for eqn in open_jaxpr(jaxpr).eqns:
        marks = around + transforms(eqn)
        if eqn.primitive.name == "scan" and "jvp(" in marks:
            found[id(eqn)] = "transpose(" in marks
        for inner in inner_jaxprs(eqn):
            found |= differentiated_scans(inner, marks)
    return found


class Factor(NamedTuple):
    """A stacked operand of a backward scan that may be half.

    Attributes:
      place: of which operand.
      half: the dtype.
      is_operand: whether a matmul in half takes it too: what is out of range there is
        infinite already.
    """

    place: int
    half: Any
    is_operand: bool


def factors(scan: Any, scope: str, decisions: Decisions) -> list[Factor]:
    """Returns which stacked operands of a backward scan may be half, and in which.

    They are factors of cotangents, and operands of matmuls in that half, and nothing
    else. No product by one is multiplied by it again, in the same step or a later one,
    but through a matmul: else a thousand roundings of a forget gate near 1 would make
    one large error, and a softmax would not sum to 1 any more.

    Args:
      scan: the equation, one that runs backward.
      scope: the name scope around it.
      decisions: what is done with the equations inside.

    Returns:
      Those operands; none if no matmul inside becomes half.
    """
    body = open_jaxpr(scan.params["jaxpr"])
    num_consts, num_carry = scan_sizes(scan)
    first = num_consts + num_carry
    ins: list[object] = [object() for _ in body.invars]
    ops: list[_Op] = []
    outs = _inline(body, join_scope(scope, scan), ins, decisions.kind_of, ops)
    carry = list(zip(ins[num_consts:first], outs[:num_carry], strict=True))
    cotangents = {x for x, _ in carry}
    _reach(ops, cotangents)
    matmuls = {
        i: decisions.low_dtype(op.eqn, op.scope) for i, op in _low(ops, decisions)
    }
    halves = set(matmuls.values()) - {None}
    if len(halves) != 1:
        return []
    (half,) = halves
    others, multiplied, operands = set(outs), set(), set()
    for index, op in enumerate(ops):
        if matmuls.get(index) == half:
            operands.update(op.ins)
        elif _is_product(op, half, decisions) and len(cotangents & set(op.ins)) == 1:
            multiplied.update(op.ins)
        else:
            others.update(op.ins)
    cut = {i for i, dtype in matmuls.items() if dtype is not None}
    return [
        Factor(index, half, piece in operands)
        for index, piece in enumerate(ins[first:], first)
        if piece in multiplied
        and piece not in others
        and is_float32(body.invars[index].aval)
        and not _compounds(piece, ops, carry, cut)
    ]


def _low(ops: list[_Op], decisions: Decisions) -> list[tuple[int, _Op]]:
    is_low = lambda op: decisions.kind_of(op.eqn) is Kind.LOW
    return [(index, op) for index, op in enumerate(ops) if is_low(op)]


def _inline(
    jaxpr: Any, scope: str, operands: list[object], kind_of: Any, ops: list[_Op]
) -> list[object]:
    """Appends the equations of a jaxpr, and of calls in it; returns its results."""
    body = open_jaxpr(jaxpr)
    names = dict(zip(body.invars, operands, strict=True))

    def read(atom):
        return (
            object() if isinstance(atom, Literal) else names.setdefault(atom, object())
        )

    for eqn in body.eqns:
        ins, inner = [read(x) for x in eqn.invars], inner_jaxprs(eqn)
        is_call = kind_of(eqn) is Kind.FREE and len(inner) == 1
        if is_call and len(open_jaxpr(inner[0]).invars) == len(ins):
            outs = _inline(inner[0], join_scope(scope, eqn), ins, kind_of, ops)
            names.update(zip(eqn.outvars, outs, strict=True))
        else:
            ops.append(_Op(eqn, scope, ins, [read(v) for v in eqn.outvars]))
    return [read(x) for x in body.outvars]


def _is_product(op: _Op, half: Any, decisions: Decisions) -> bool:
    return (
        op.eqn.primitive.name == "mul"
        and decisions.kind_of(op.eqn) is Kind.FOLLOW
        and decisions.half_of(join_scope(op.scope, op.eqn)) == half
    )


def _reach(ops: list[_Op], found: set[object]) -> None:
    """Adds to `found` all that depends on it."""
    for op in ops:
        if not found.isdisjoint(op.ins):
            found.update(op.outs)


def _compounds(
    piece: object, ops: list[_Op], carry: list[tuple[object, object]], cut: set[int]
) -> bool:
    """Whether what was multiplied by a piece is so again before the next matmul."""
    found = {piece}
    while True:
        for index, op in enumerate(ops):
            num_found = 0 if index in cut else sum(x in found for x in op.ins)
            if num_found > 1 and op.eqn.primitive.name not in _ADDITIVE:
                return True
            if num_found:
                found.update(op.outs)
        again = {before for before, after in carry if after in found} - found
        if not again:
            return False
        found |= again


def are_bounded(jaxpr: Any, inputs: Sequence[bool] = ()) -> list[bool]:
    """Tells which results are made of saturating functions, and so fit in float16.

    Args:
      jaxpr: closed or open.
      inputs: the same of its inputs; of none if empty.
    """
    body = open_jaxpr(jaxpr)
    known = {v for v, is_so in zip(body.invars, inputs, strict=False) if is_so}

    def is_bounded(atom):
        if isinstance(atom, Literal):
            return is_float32(atom.aval) and bool(np.all(np.abs(atom.val) <= 1))
        return atom in known

    for eqn in body.eqns:
        name, inner = eqn.primitive.name, inner_jaxprs(eqn)
        operands = [is_bounded(x) for x in eqn.invars]
        if name in ACTIVATION or (name in _KEEPS_BOUNDED and all(operands)):
            known.update(eqn.outvars)
        elif name in FREE and len(inner) == 1:
            results = are_bounded(inner[0], operands)
            pairs = zip(eqn.outvars, results, strict=True)
            known.update(v for v, is_so in pairs if is_so)
    return [is_bounded(x) for x in body.outvars]
