"""A backward analysis of a jaxpr: what its consumers demand of each value.

Where every consumer of a sum or product wants float32, rounding it to half in between
only loses bits: the operation itself then runs in float32. Where every consumer of
a maximum or a reshape wants half, rounding its operand gives the same numbers as
rounding its result, and the values in between, often saved for the backward pass, take
half the memory. Where a sum goes on to a matmul of its own pass, it may be stored in
half (`sums.py`).
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp

from mpjax._autocast.eligibility import (
    asks_for_sign,
    derivative_is_sum,
    is_eligible,
)
from mpjax._autocast.kinds import CONTAINERS
from mpjax._jaxpr.core import Literal, inner_jaxprs, is_float32, is_var, open_jaxpr
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.primitives import Kind, facts_of
from mpjax._jaxpr.provenance import RESERVED_HALF, is_backward, is_reserved, join_scope


class Demand(NamedTuple):
    """What the consumers of a value demand.

    Attributes:
      halves: the half dtypes in which some consumer takes it.
      wants_float32: whether some consumer would rather have float32.
      must_keep: whether some consumer must have it as traced: an output, a loop, an
        opaque operation.
      flows: the half dtypes in which it goes on to a matmul of its own pass, forward or
        backward, through arithmetic.
    """

    halves: frozenset
    wants_float32: bool
    must_keep: bool = False
    flows: frozenset = frozenset()

    def only_half(self) -> Any:
        """Returns the one half dtype that every consumer wants, or None."""
        if self.wants_float32 or len(self.halves) != 1:
            return None
        return next(iter(self.halves))


NO_DEMAND = Demand(frozenset(), wants_float32=False)
WANTS_FLOAT32 = Demand(frozenset(), wants_float32=True)
MUST_KEEP = Demand(frozenset(), wants_float32=True, must_keep=True)


class DemandAnalysis:
    """Finds the demand on each variable, per jaxpr.

    Args:
      kind_of: the kind of an equation.
      half_dtype: `(eqn, scope) -> half dtype` of a matmul, or None if it stays in
        float32.
    """

    def __init__(self, kind_of: Callable, half_dtype: Callable):
        self._kind_of = kind_of
        self._half_dtype = half_dtype
        self._has_matmul: dict[int, tuple[Any, bool]] = {}
        self._known: dict[Any, tuple[Any, dict, tuple[Demand, ...]]] = {}

    def can_change(self, jaxpr: Any) -> bool:
        """Whether anything inside can be half: a matmul, or a custom derivative."""
        known = self._has_matmul.get(id(jaxpr))
        if known is None:
            found = any(self._eqn_can_change(eqn) for eqn in open_jaxpr(jaxpr).eqns)
            known = self._has_matmul[id(jaxpr)] = (jaxpr, found)
        return known[1]

    def is_elementwise(self, eqn: Any) -> bool:
        """Whether it is a `custom_jvp` function with no matmul, such as relu."""
        return (
            self._kind_of(eqn) is Kind.CUSTOM
            and eqn.primitive.name == "custom_jvp_call"
            and not any(map(self.can_change, inner_jaxprs(eqn)))
        )

    def _eqn_can_change(self, eqn: Any) -> bool:
        kind = self._kind_of(eqn)
        if kind is Kind.HALF or is_reserved(eqn, RESERVED_HALF):
            return True
        if kind in CONTAINERS:
            if eqn.primitive.name == "custom_vjp_call":
                return True
            return any(map(self.can_change, inner_jaxprs(eqn)))
        return False

    def demands(
        self,
        jaxpr: Any,
        outputs: tuple[Demand, ...],
        scope: str,
        in_backward: bool = False,
    ) -> tuple[dict, tuple[Demand, ...]]:
        """Returns the demand on each variable.

        Args:
          jaxpr: closed or open.
          outputs: the demand on each output from outside.
          scope: the name scope of the jaxpr.
          in_backward: whether it belongs to a backward pass.

        Returns:
          A `Demand` per variable (`NO_DEMAND` where it has none), and one per input.
        """
        cache_key = (id(jaxpr), outputs, scope, in_backward)
        known = self._known.get(cache_key)
        if known is None:
            body = open_jaxpr(jaxpr)
            found = self._find(body, outputs, scope, in_backward)
            per_input = tuple(found.get(v, NO_DEMAND) for v in body.invars)
            known = self._known[cache_key] = (jaxpr, found, per_input)
        return known[1], known[2]

    def _find(
        self, body: Any, outputs: tuple[Demand, ...], scope: str, in_backward: bool
    ) -> dict:
        """Returns the demand on each variable, from the last equation to the first.

        What the other pass reads does not count for `flows`, except on a bounded value
        that nothing reads in its own pass: it is saved for the other pass alone.
        """
        found: dict = {}
        passes = [is_backward(eqn, in_backward) for eqn in body.eqns]
        made_in = {
            var: own
            for eqn, own in zip(body.eqns, passes, strict=True)
            for var in eqn.outvars
        }
        _add(found, body.outvars, outputs)
        read_in_own = set(filter(is_var, body.outvars))
        bounded = self._bounded(body)
        for eqn, own in zip(reversed(body.eqns), reversed(passes), strict=True):
            demands = self._operand_demands(eqn, found, scope, own)
            for var in bounded.intersection(eqn.outvars) - read_in_own:
                demand = found.get(var, NO_DEMAND)
                found[var] = demand._replace(flows=demand.halves)
            for x, demand in zip(eqn.invars, demands, strict=True):
                if is_var(x) and made_in.get(x, own) is not own:
                    demand = demand._replace(flows=frozenset())
                elif is_var(x):
                    read_in_own.add(x)
                _add(found, (x,), (demand,))
        return found

    def _bounded(self, body: Any) -> set[Any]:
        """Returns the variables that activation functions and arithmetic keep small."""
        found: set[Any] = set()
        for eqn in body.eqns:
            facts = facts_of(eqn)
            is_arithmetic = facts.is_cheap and self._kind_of(eqn) is Kind.PROMOTE
            variables = set(filter(is_var, eqn.invars))
            if facts.is_activation or (
                is_arithmetic and variables and found.issuperset(variables)
            ):
                found.update(eqn.outvars)
        return found

    def _operand_demands(
        self, eqn: Any, found: dict, scope: str, in_backward: bool
    ) -> Iterable[Demand]:
        """Returns the demands of an equation on its operands.

        Args:
          eqn: the equation.
          found: the demands known so far, those on its results among them.
          scope: the name scope of the jaxpr.
          in_backward: whether the equation belongs to a backward pass.
        """
        kind = self._kind_of(eqn)
        if kind is Kind.OPAQUE and asks_for_sign(eqn):
            demand = NO_DEMAND
        elif kind is Kind.HALF:
            dtype = self._half_dtype(eqn, scope)
            demand = (
                WANTS_FLOAT32
                if dtype is None
                else Demand(
                    frozenset((dtype,)), wants_float32=False, flows=frozenset((dtype,))
                )
            )
        elif kind is Kind.PROMOTE and is_eligible(eqn):
            results = [found.get(v, NO_DEMAND) for v in eqn.outvars]
            return _promote_demands(eqn, results)
        elif kind in (Kind.CALL, Kind.COND) or self.is_elementwise(eqn):
            return self._call_demands(eqn, found, scope, in_backward)
        elif kind is Kind.LOOP and eqn.primitive.name == "scan":
            return self._scan_demands(eqn, scope, in_backward)
        else:
            is_arithmetic = kind in (Kind.FLOAT32, Kind.PROMOTE)
            demand = WANTS_FLOAT32 if is_arithmetic else MUST_KEEP
        return [demand] * len(eqn.invars)

    def _call_demands(
        self, eqn: Any, found: dict, scope: str, in_backward: bool
    ) -> list[Demand]:
        """Returns the demands of the jaxprs inside; a conditional keeps its results."""
        is_cond = self._kind_of(eqn) is Kind.COND
        results = tuple(
            MUST_KEEP if is_cond else found.get(v, NO_DEMAND) for v in eqn.outvars
        )
        inner_scope = join_scope(scope, eqn)
        index = (NO_DEMAND,) if is_cond else ()
        per_jaxpr = [
            (*index, *self.demands(inner, results, inner_scope, in_backward)[1])
            for inner in inner_jaxprs(eqn)
        ]
        if any(len(demands) != len(eqn.invars) for demands in per_jaxpr):
            return [MUST_KEEP] * len(eqn.invars)
        return [_join(demands) for demands in zip(*per_jaxpr, strict=True)]

    def _scan_demands(self, eqn: Any, scope: str, in_backward: bool) -> list[Demand]:
        """Returns half for each stack whose slices the body takes only in half.

        Constants and the carry stay as traced: otherwise the gradient of a constant,
        accumulated over the steps, would be half.

        In a backward pass, a stack is also half if its slices, or a carry that they go
        into, reach a matmul: it is a residual of the forward loop, which a model by
        hand saves in half. The forward loop computes with the float32 value, which may
        lie beyond the range of float16: there such a stack stays as traced.
        """
        scan = Scan(eqn)
        carry = scan.split_operands(eqn.invars)[1]
        outputs = (MUST_KEEP,) * len(eqn.outvars)
        demands = self._body_demands(eqn, outputs, scope, in_backward)
        if in_backward:
            taken = (x._replace(must_keep=True) for x in demands[1])
            outputs = (*taken, *outputs[len(carry) :])
            demands = self._body_demands(eqn, outputs, scope, in_backward)
        stacked = [_stack_demand(demand, in_backward) for demand in demands[2]]
        return [MUST_KEEP] * (len(eqn.invars) - len(stacked)) + stacked

    def _body_demands(
        self, eqn: Any, outputs: tuple[Demand, ...], scope: str, in_backward: bool
    ) -> Any:
        """Returns the demands of a scan's body on constants, carry and slices."""
        body, inner_scope = eqn.params["jaxpr"], join_scope(scope, eqn)
        _, demands = self.demands(body, outputs, inner_scope, in_backward)
        return Scan(eqn).split_operands(demands)


def _stack_demand(demand: Demand, in_backward: bool) -> Demand:
    """Returns the demand on a stack from the demand on its slices in a loop's body."""
    if demand.only_half():
        return demand
    if not in_backward or len(demand.halves) != 1 or demand.must_keep:
        return MUST_KEEP
    (dtype,) = demand.halves
    has_range = jnp.finfo(dtype).maxexp == jnp.finfo(jnp.float32).maxexp
    return demand._replace(wants_float32=False) if has_range else MUST_KEEP


def _promote_demands(eqn: Any, results: list[Demand]) -> list[Demand]:
    facts = facts_of(eqn)
    out = _join(results)
    if not facts.is_exact or facts.shrinks or derivative_is_sum(eqn):
        # It may run in half if its result is taken in half, but prefers float32.
        out = Demand(out.halves, wants_float32=True, flows=out.flows)
    demands = [out] * len(eqn.invars)
    if eqn.primitive.name == "select_and_scatter_add":
        # The second operand is only compared, so it need not be float32.
        demands[1] = out._replace(wants_float32=False, must_keep=False)
    return demands


def _join(demands: Iterable[Demand]) -> Demand:
    demands = set(demands)
    if len(demands) == 1:
        return demands.pop()
    return Demand(
        frozenset().union(*(demand.halves for demand in demands)),
        any(demand.wants_float32 for demand in demands),
        any(demand.must_keep for demand in demands),
        frozenset().union(*(demand.flows for demand in demands)),
    )


def _add(found: dict, atoms: Iterable[Any], demands: Iterable[Demand]) -> None:
    for atom, demand in zip(atoms, demands, strict=True):
        if demand is NO_DEMAND or isinstance(atom, Literal):
            continue
        if is_float32(atom.aval):
            old = found.get(atom)
            found[atom] = demand if old is None else _join((old, demand))
