"""Who wants float32: a backward pass over a jaxpr.

Where every consumer of a sum or product wants float32, rounding it to half in between
only loses bits: the operation itself then runs in float32.
"""

from collections.abc import Callable
from typing import Any

from mpjax._jaxpr import Literal, inner_jaxprs, is_float32, join_scope, open_jaxpr
from mpjax.autocast._decide import is_eligible, is_reserved
from mpjax.autocast._tables import Kind


class Demand:
    """Finds, per jaxpr, the variables with a consumer that takes half.

    Args:
      kind_of: the kind of an equation.
      low_dtype: `(eqn, scope) -> half dtype`, or None if it stays in float32.
    """

    def __init__(self, kind_of: Callable, low_dtype: Callable):
        self._kind_of = kind_of
        self._low_dtype = low_dtype
        self._has_low: dict[int, tuple[Any, bool]] = {}
        self._halves: dict[Any, tuple[Any, set, tuple[bool, ...]]] = {}

    def has_low(self, jaxpr: Any) -> bool:
        """Whether anything inside can become half: a matmul, or a custom derivative."""
        known = self._has_low.get(id(jaxpr))
        if known is None:
            found = any(self._eqn_has_low(eqn) for eqn in open_jaxpr(jaxpr).eqns)
            known = self._has_low[id(jaxpr)] = (jaxpr, found)
        return known[1]

    def _eqn_has_low(self, eqn: Any) -> bool:
        kind = self._kind_of(eqn)
        if kind is Kind.LOW:
            return True
        if kind in (Kind.FREE, Kind.BRANCH, Kind.FIXED, Kind.CUSTOM):
            if eqn.primitive.name == "custom_vjp_call":
                return True
            return any(map(self.has_low, inner_jaxprs(eqn)))
        return False

    def halves(
        self, jaxpr: Any, out_half: tuple[bool, ...], scope: str
    ) -> tuple[set, tuple[bool, ...]]:
        """Returns the variables of which some consumer takes half.

        Args:
          jaxpr: closed or open.
          out_half: per output, whether a consumer outside takes half.
          scope: the name scope of the jaxpr.

        Returns:
          The set of variables, and the same per input of the jaxpr.
        """
        body = open_jaxpr(jaxpr)
        if not any(out_half) and not self.has_low(jaxpr):
            return set(), (False,) * len(body.invars)
        cache_key = (id(jaxpr), out_half, scope)
        known = self._halves.get(cache_key)
        if known is None:
            found = self._find(body, out_half, scope)
            per_input = tuple(v in found for v in body.invars)
            known = self._halves[cache_key] = (jaxpr, found, per_input)
        return known[1], known[2]

    def _find(self, body: Any, out_half: tuple[bool, ...], scope: str) -> set:
        half: set = set()
        _add(half, body.outvars, out_half)
        for eqn in reversed(body.eqns):
            kind = self._kind_of(eqn)
            if kind is Kind.LOW:
                if self._low_dtype(eqn, scope) is not None:
                    _add(half, eqn.invars)
            elif kind is Kind.FOLLOW:
                if any(v in half for v in eqn.outvars) and is_eligible(eqn):
                    _add(half, eqn.invars)
            elif kind is Kind.FREE and not is_reserved(eqn):
                outs = tuple(v in half for v in eqn.outvars)
                for sub in inner_jaxprs(eqn):
                    inner = self.halves(sub, outs, join_scope(scope, eqn))[1]
                    _add(half, eqn.invars, inner)
            elif kind is Kind.BRANCH:
                outs = (False,) * len(eqn.outvars)
                for sub in inner_jaxprs(eqn):
                    inner = self.halves(sub, outs, join_scope(scope, eqn))[1]
                    _add(half, eqn.invars[1:], inner)
        return half


def _add(half: set, atoms: Any, flags: Any = None) -> None:
    for index, atom in enumerate(atoms):
        wanted = flags is None or flags[index]
        if wanted and not isinstance(atom, Literal) and is_float32(atom.aval):
            half.add(atom)
