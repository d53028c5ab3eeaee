"""Who wants what: a backward pass over a jaxpr.

Where every consumer of a sum or product wants float32, rounding it to half in between
only loses bits: the operation itself then runs in float32. And where every consumer of
a maximum or a reshape wants half, rounding before it is rounding after it, and what
lies between, often saved for the backward pass, is half as large.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from mpjax._autocast.decide import asks_for_sign, is_eligible
from mpjax._jaxpr.core import (
    Literal,
    inner_jaxprs,
    is_float32,
    join_scope,
    open_jaxpr,
)
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.primitives import Kind, facts_of


class Wish(NamedTuple):
    """What the consumers of a value want.

    Attributes:
      halves: the half dtypes in which some consumer takes it.
      full: whether some consumer would rather have float32.
      exact: whether some consumer must have it as traced: an output, a loop, an
        operation that is not to be touched.
    """

    halves: frozenset
    full: bool
    exact: bool = False

    def only_half(self) -> Any:
        """Returns the one half dtype that every consumer wants, or None."""
        if self.full or len(self.halves) != 1:
            return None
        return next(iter(self.halves))


NOTHING = Wish(frozenset(), full=False)
FULL = Wish(frozenset(), full=True)
EXACTLY = Wish(frozenset(), full=True, exact=True)


class Demand:
    """Finds, per jaxpr, what the consumers of each variable want.

    Args:
      kind_of: the kind of an equation.
      low_dtype: `(eqn, scope) -> half dtype`, or None if it stays in float32.
    """

    def __init__(self, kind_of: Callable, low_dtype: Callable):
        self._kind_of = kind_of
        self._low_dtype = low_dtype
        self._has_low: dict[int, tuple[Any, bool]] = {}
        self._known: dict[Any, tuple[Any, dict, tuple[Wish, ...]]] = {}

    def has_low(self, jaxpr: Any) -> bool:
        """Whether anything inside can become half: a matmul, or a custom derivative."""
        known = self._has_low.get(id(jaxpr))
        if known is None:
            found = any(self._eqn_has_low(eqn) for eqn in open_jaxpr(jaxpr).eqns)
            known = self._has_low[id(jaxpr)] = (jaxpr, found)
        return known[1]

    def is_elementwise(self, eqn: Any) -> bool:
        """Whether it is a `custom_jvp` function with no matmul, such as relu."""
        return (
            self._kind_of(eqn) is Kind.CUSTOM
            and eqn.primitive.name == "custom_jvp_call"
            and not any(map(self.has_low, inner_jaxprs(eqn)))
        )

    def _eqn_has_low(self, eqn: Any) -> bool:
        kind = self._kind_of(eqn)
        if kind is Kind.HALF:
            return True
        if kind in (Kind.CALL, Kind.COND, Kind.LOOP, Kind.CUSTOM):
            if eqn.primitive.name == "custom_vjp_call":
                return True
            return any(map(self.has_low, inner_jaxprs(eqn)))
        return False

    def wishes(
        self, jaxpr: Any, outputs: tuple[Wish, ...], scope: str
    ) -> tuple[dict, tuple[Wish, ...]]:
        """Returns what is wanted of each variable.

        Args:
          jaxpr: closed or open.
          outputs: what is wanted of each output outside.
          scope: the name scope of the jaxpr.

        Returns:
          A `Wish` per variable (`NOTHING` where it has none), and one per input.
        """
        cache_key = (id(jaxpr), outputs, scope)
        known = self._known.get(cache_key)
        if known is None:
            body = open_jaxpr(jaxpr)
            found = self._find(body, outputs, scope)
            per_input = tuple(found.get(v, NOTHING) for v in body.invars)
            known = self._known[cache_key] = (jaxpr, found, per_input)
        return known[1], known[2]

    def _find(self, body: Any, outputs: tuple[Wish, ...], scope: str) -> dict:
        found: dict = {}
        _add(found, body.outvars, outputs)
        for eqn in reversed(body.eqns):
            _add(found, eqn.invars, self._of_operands(eqn, found, scope))
        return found

    def _of_operands(self, eqn: Any, found: dict, scope: str) -> Iterable[Wish]:
        """What an equation wants of its operands, given what is wanted of it."""
        kind = self._kind_of(eqn)
        if kind is Kind.OPAQUE and asks_for_sign(eqn):
            wish = NOTHING
        elif kind is Kind.HALF:
            dtype = self._low_dtype(eqn, scope)
            wish = FULL if dtype is None else Wish(frozenset((dtype,)), full=False)
        elif kind is Kind.PROMOTE and is_eligible(eqn):
            return _of_following(eqn, [found.get(v, NOTHING) for v in eqn.outvars])
        elif kind in (Kind.CALL, Kind.COND) or self.is_elementwise(eqn):
            is_call = kind is not Kind.COND
            wanted = tuple(
                found.get(v, NOTHING) if is_call else EXACTLY for v in eqn.outvars
            )
            inner_scope = join_scope(scope, eqn)
            skipped = () if is_call else (NOTHING,)
            per_jaxpr = [
                (*skipped, *self.wishes(sub, wanted, inner_scope)[1])
                for sub in inner_jaxprs(eqn)
            ]
            if all(len(wishes) == len(eqn.invars) for wishes in per_jaxpr):
                return [_join(wishes) for wishes in zip(*per_jaxpr, strict=True)]
            wish = EXACTLY
        elif kind is Kind.LOOP and eqn.primitive.name == "scan":
            return self._of_scan(eqn, scope)
        else:
            wish = FULL if kind in (Kind.FLOAT32, Kind.PROMOTE) else EXACTLY
        return [wish] * len(eqn.invars)

    def _of_scan(self, eqn: Any, scope: str) -> list[Wish]:
        """Half where the body takes a piece of a stack in half alone; else as traced.

        A constant is as traced: its gradient, gathered over the steps, would be half.
        """
        outputs = (EXACTLY,) * len(eqn.outvars)
        _, wishes = self.wishes(eqn.params["jaxpr"], outputs, join_scope(scope, eqn))
        consts, carry, xs = Scan(eqn).split_operands(wishes)
        stacked = [wish if wish.only_half() else EXACTLY for wish in xs]
        return [EXACTLY] * len(consts + carry) + stacked


def _of_following(eqn: Any, wanted: list[Wish]) -> list[Wish]:
    facts = facts_of(eqn)
    out = _join(wanted)
    if not facts.is_exact or facts.shrinks:
        # Half will do if the result goes on in half; float32 operands are welcome.
        out = Wish(out.halves, full=True)
    wishes = [out] * len(eqn.invars)
    if eqn.primitive.name == "select_and_scatter_add":
        # The second operand is only compared: no reason to keep it in float32.
        wishes[1] = Wish(out.halves, full=False)
    return wishes


def _join(wishes: Iterable[Wish]) -> Wish:
    wishes = set(wishes)
    if len(wishes) == 1:
        return wishes.pop()
    halves = frozenset().union(*(wish.halves for wish in wishes))
    full = any(wish.full for wish in wishes)
    return Wish(halves, full, any(wish.exact for wish in wishes))


def _add(found: dict, atoms: Iterable[Any], wishes: Iterable[Wish]) -> None:
    for atom, wish in zip(atoms, wishes, strict=True):
        if wish is NOTHING or isinstance(atom, Literal) or not is_float32(atom.aval):
            continue
        old = found.get(atom)
        found[atom] = wish if old is None else _join((old, wish))
