"""Where the values of a jaxpr come from: what the findings of a report rest upon.

A jaxpr is run on descriptions of values in place of values, into jit, scan, while, cond
and functions with derivatives of their own. Loops are run until nothing changes, then
once more, to be looked at.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.core import Tracer

from mpjax._jaxpr.core import Literal, inner_jaxprs, open_jaxpr
from mpjax._jaxpr.loops import Scan
from mpjax.numerics._place import Place

# Ops whose parameter is a jaxpr of scalars, by which they reduce: no calls.
_REDUCERS = ("reduce", "scatter", "select_and")

# The result holds the operand's numbers, none changed.
MOVEMENT = frozenset(
    (
        "broadcast_in_dim",
        "copy",
        "name",
        "optimization_barrier",
        "pvary",
        "reshape",
        "reshard",
        "rev",
        "sharding_constraint",
        "slice",
        "squeeze",
        "stop_gradient",
        "transpose",
    )
)


class Site(NamedTuple):
    """Where an equation is.

    Attributes:
      primitive: its name.
      scope: its name scope.
      source: the user's source line.
    """

    primitive: str
    scope: str
    source: str


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a value.

    Attributes:
      is_constant: whether it is made of no floating argument, and of nothing in half:
        of constants, integers and random numbers.
      site: where it was computed, casts and movement aside; None for an argument.
      cast: the equation that cast it, if nothing but movement came after that.
      is_used_once: whether the result of that cast has no second use.
      leak: source line at which it became float32 unasked.
      is_float64: whether it is float64 because of an argument, or reported already.
      carried: the iteration's own carried value that it is, or was cast from.
      accumulated: the carried value that it is plus something independent of it.
      depends_on: the carried values that it is made of.
    """

    is_constant: bool = True
    site: Site | None = None
    cast: Any = None
    is_used_once: bool = False
    leak: str = ""
    is_float64: bool = False
    carried: Any = None
    accumulated: Any = None
    depends_on: frozenset = frozenset()

    def join(self, other: "Value") -> "Value":
        """Returns what is known of a value that is either of two."""
        return Value(
            is_constant=self.is_constant and other.is_constant,
            site=self.site or other.site,
            leak=self.leak or other.leak,
            is_float64=self.is_float64 and other.is_float64,
            depends_on=self.depends_on | other.depends_on,
        )


class Flow:
    """Runs a jaxpr on descriptions of values.

    Args:
      rule: `(eqn, values, place) -> value` gives what each output of an operation is.
      on_carry: `(eqn, place, value, index, trips)` is called with each value that
        a loop carries, at the end of an iteration. Its `accumulated` is
        `((loop, index), site)`, made by `rule`.
    """

    def __init__(self, rule: Callable[..., Value], on_carry: Callable[..., None]):
        self.is_muted = False
        self._rule = rule
        self._on_carry = on_carry

    def run(self, jaxpr: Any, values: Sequence[Value], place: Place) -> list[Value]:
        """Returns what is known of the outputs."""
        body = open_jaxpr(jaxpr)
        uses = _count_uses(body)
        env = {}
        for var, value in zip(body.invars, values, strict=True):
            env[var] = _in_use(value, uses[var])
        consts = getattr(jaxpr, "consts", ())
        for var, const in zip(body.constvars, consts, strict=False):
            # What an outer transformation traces is no constant.
            env[var] = Value(is_constant=not isinstance(const, Tracer))
        read = lambda x: Value() if isinstance(x, Literal) else env.get(x, Value())
        for eqn in body.eqns:
            inner = place.enter(eqn)
            outputs = self._equation(eqn, [read(x) for x in eqn.invars], inner)
            for var, value in zip(eqn.outvars, outputs, strict=True):
                env[var] = _in_use(value, uses[var])
        return [read(x) for x in body.outvars]

    def _equation(self, eqn: Any, values: list[Value], place: Place) -> list[Value]:
        name = eqn.primitive.name
        inside = place.inside(eqn)
        if not is_call(eqn):
            return [self._rule(eqn, values, place)] * len(eqn.outvars)
        if name == "scan":
            scan = Scan(eqn)
            consts, carry, xs = scan.split_operands(values)
            return self._loop(eqn, scan.jaxpr, consts, carry, xs, scan.length, inside)
        if name == "while":
            num_cond = eqn.params["cond_nconsts"]
            cond, body, carry = _cut(values, num_cond, eqn.params["body_nconsts"])
            outputs = self._loop(
                eqn, eqn.params["body_jaxpr"], body, carry, [], None, inside
            )
            self.run(eqn.params["cond_jaxpr"], [*cond, *outputs], inside)
            return outputs
        if name == "cond":
            runs = [self.run(x, values[1:], inside) for x in eqn.params["branches"]]
            outputs = runs[0]
            for other in runs[1:]:
                outputs = [a.join(b) for a, b in zip(outputs, other, strict=True)]
            return outputs
        bodies = inner_jaxprs(eqn)
        body = open_jaxpr(bodies[0])
        if len(bodies) == 1 and len(body.invars) == len(values):
            outputs = self.run(bodies[0], values, inside)
            if len(outputs) == len(eqn.outvars):
                return outputs
        else:  # A solver or kernel: what goes in where is not known.
            for x in bodies:
                given = [Value(is_constant=False) for _ in open_jaxpr(x).invars]
                self.run(x, given, inside)
        return [Value(is_constant=False, site=_site(eqn, place))] * len(eqn.outvars)

    def _loop(
        self,
        eqn: Any,
        body: Any,
        consts: list[Value],
        carry: list[Value],
        xs: list[Value],
        trips: int | None,
        place: Place,
    ) -> list[Value]:
        was_muted, self.is_muted = self.is_muted, True
        carry = [x.join(x) for x in carry]
        while True:
            outputs = self.run(body, [*consts, *carry, *xs], place)
            joined = [a.join(b) for a, b in zip(carry, outputs, strict=False)]
            if [_settled(x) for x in joined] == [_settled(x) for x in carry]:
                break
            carry = joined
        self.is_muted = was_muted
        tokens = [(id(eqn), i) for i in range(len(carry))]
        marked = [
            dataclasses.replace(x, carried=t, depends_on=x.depends_on | {t})
            for x, t in zip(carry, tokens, strict=True)
        ]
        outputs = self.run(body, [*consts, *marked, *xs], place)
        for i in range(len(carry)):
            self._on_carry(eqn, place, outputs[i], tokens[i], trips)
        own = frozenset(tokens)
        return [
            dataclasses.replace(x.join(x), depends_on=x.depends_on - own)
            for x in outputs
        ]


def is_call(eqn: Any) -> bool:
    """Whether an equation only runs what is inside it."""
    return bool(inner_jaxprs(eqn)) and not eqn.primitive.name.startswith(_REDUCERS)


def _count_uses(body: Any) -> dict[Any, int]:
    atoms = [x for eqn in body.eqns for x in eqn.invars] + list(body.outvars)
    return collections.Counter(x for x in atoms if not isinstance(x, Literal))


def _in_use(value: Value, num_uses: int) -> Value:
    once = value.is_used_once and num_uses == 1
    return dataclasses.replace(value, is_used_once=once)


def _site(eqn: Any, place: Place) -> Site:
    return Site(eqn.primitive.name, place.scope, place.source)


def _settled(value: Value) -> tuple:
    return value.is_constant, bool(value.leak), value.is_float64, value.depends_on


def _cut(values: list[Any], *sizes: int) -> list[list[Any]]:
    parts = []
    for size in sizes:
        parts.append(values[:size])
        values = values[size:]
    return [*parts, values]
