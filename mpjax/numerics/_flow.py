"""Abstract interpretation of jaxprs, on which the findings of a report rest.

A jaxpr is run on abstract values, through jit, scan, while, cond and functions with
custom derivatives. A loop is run until nothing changes, then once more for the rules to
inspect.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.core import Tracer

from mpjax._jaxpr.core import (
    Literal,
    count_uses,
    inner_jaxprs,
    jaxprs_meant,
    open_jaxpr,
)
from mpjax._jaxpr.loops import Scan, While
from mpjax._jaxpr.primitives import facts_of
from mpjax.numerics._eqn_context import EqnContext
from mpjax.numerics._half_results import UNKNOWN, History


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
class AbstractValue:
    """What is known of a value.

    Attributes:
      is_constant: whether it is made of no floating argument and of nothing in half,
        only of constants, integers and random numbers.
      site: where it was computed, before any casts and data movement; None for an
        argument.
      cast: the equation that cast it, if only data movement came after the cast.
      is_used_once: whether the result of that cast has no second use.
      leak: source line at which it became float32 by promotion.
      is_float64: whether it is float64 because of an argument, or reported already.
      carried: the loop's carried value, as `(loop, index)`, that it is or was cast
        from.
      accumulated: `(carried, site)` if it is a carried value plus something
        independent of it.
      depends_on: the carried values that it is made of.
      history: what half matmuls, squares and choices it was made of.
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
    history: History = UNKNOWN

    def join(self, other: "AbstractValue") -> "AbstractValue":
        """Returns what is known of a value that may be either of two."""
        return AbstractValue(
            is_constant=self.is_constant and other.is_constant,
            site=self.site or other.site,
            leak=self.leak or other.leak,
            is_float64=self.is_float64 and other.is_float64,
            depends_on=self.depends_on | other.depends_on,
            history=self.history.join(other.history),
        )


class Flow:
    """Runs a jaxpr on abstract values.

    Args:
      rule: `(eqn, values, context) -> value` returns the outputs of an operation, all
        of which have the same abstract value.
      on_carry: `(eqn, context, value, token, trips)` is called with each carried value
        at the end of an iteration. The token is `(loop, index)`; `value.accumulated` is
        `(token, site)`, made by `rule`. `trips` is None for a `while`.
    """

    def __init__(
        self, rule: Callable[..., AbstractValue], on_carry: Callable[..., None]
    ):
        self.is_muted = False
        self._rule = rule
        self._on_carry = on_carry

    def run(
        self, jaxpr: Any, values: Sequence[AbstractValue], context: EqnContext
    ) -> list[AbstractValue]:
        """Returns the abstract values of the outputs."""
        body = open_jaxpr(jaxpr)
        uses = count_uses(body)
        env = {}
        for var, value in zip(body.invars, values, strict=True):
            env[var] = _in_use(value, uses[var])
        consts = getattr(jaxpr, "consts", ())
        for var, const in zip(body.constvars, consts, strict=False):
            # A tracer of an outer transformation is not a constant.
            env[var] = AbstractValue(
                is_constant=not isinstance(const, Tracer),
                history=History(origin=id(const)),
            )

        def read(atom):
            constant = AbstractValue()
            return constant if isinstance(atom, Literal) else env.get(atom, constant)

        for eqn in body.eqns:
            operands = [read(x) for x in eqn.invars]
            outputs = self._equation(eqn, operands, context.enter(eqn))
            for var, value in zip(eqn.outvars, outputs, strict=True):
                env[var] = _in_use(value, uses[var])
        return [read(x) for x in body.outvars]

    def _equation(
        self, eqn: Any, values: list[AbstractValue], context: EqnContext
    ) -> list[AbstractValue]:
        name = eqn.primitive.name
        inside = context.inside(eqn)
        if not holds_operations(eqn):
            if facts_of(eqn).moves_data and len(eqn.outvars) == len(values) > 1:
                return values  # A barrier, for instance.
            return [self._rule(eqn, values, context)] * len(eqn.outvars)
        if name == "scan":
            scan = Scan(eqn)
            consts, carry, xs = scan.split_operands(values)
            return self._loop(eqn, scan.jaxpr, consts, carry, xs, scan.length, inside)
        if name == "while":
            loop = While(eqn)
            parts = loop.split_operands(values)
            outputs = self._loop(
                eqn, loop.body, parts.body_consts, parts.carry, [], None, inside
            )
            self.run(loop.cond, [*parts.cond_consts, *outputs], inside)
            return outputs
        if name == "cond":
            outputs, *others = [
                self.run(x, values[1:], inside) for x in jaxprs_meant(eqn)
            ]
            for other in others:
                outputs = [a.join(b) for a, b in zip(outputs, other, strict=True)]
            return outputs
        return self._call(eqn, values, context)

    def _call(
        self, eqn: Any, values: list[AbstractValue], context: EqnContext
    ) -> list[AbstractValue]:
        inside = context.inside(eqn)
        bodies = inner_jaxprs(eqn)
        body = open_jaxpr(bodies[0])
        if len(bodies) == 1 and len(body.invars) == len(values):
            outputs = self.run(bodies[0], values, inside)
            if len(outputs) == len(eqn.outvars):
                return outputs
        else:  # In a solver or kernel, which operand goes where is unknown.
            for x in bodies:
                unknown = [
                    AbstractValue(is_constant=False) for _ in open_jaxpr(x).invars
                ]
                self.run(x, unknown, inside)
        output = AbstractValue(is_constant=False, site=site_of(eqn, context))
        return [output] * len(eqn.outvars)

    def _loop(
        self,
        eqn: Any,
        body: Any,
        consts: list[AbstractValue],
        carry: list[AbstractValue],
        xs: list[AbstractValue],
        trips: int | None,
        context: EqnContext,
    ) -> list[AbstractValue]:
        was_muted, self.is_muted = self.is_muted, True
        carry = [x.join(x) for x in carry]
        while True:
            outputs = self.run(body, [*consts, *carry, *xs], context)
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
        outputs = self.run(body, [*consts, *marked, *xs], context)
        for output, token in zip(outputs, tokens, strict=False):
            self._on_carry(eqn, context, output, token, trips)
        own = frozenset(tokens)
        return [
            dataclasses.replace(x.join(x), depends_on=x.depends_on - own)
            for x in outputs
        ]


def holds_operations(eqn: Any) -> bool:
    """Whether an equation is a call, branch or loop, not an operation itself."""
    return bool(inner_jaxprs(eqn)) and not facts_of(eqn).reduces_by_jaxpr


def site_of(eqn: Any, context: EqnContext) -> Site:
    """Returns where an equation is."""
    return Site(eqn.primitive.name, context.scope, context.source)


def _in_use(value: AbstractValue, num_uses: int) -> AbstractValue:
    once = value.is_used_once and num_uses == 1
    return dataclasses.replace(value, is_used_once=once)


def _settled(value: AbstractValue) -> tuple:
    """Returns the facts by which an iteration may still change the next one."""
    return (
        value.is_constant,
        bool(value.leak),
        value.is_float64,
        value.depends_on,
        value.history,
    )
