"""Finds the operation that made the first Inf or NaN, by evaluating a jaxpr."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mpjax._jaxpr import core as _jaxpr
from mpjax._jaxpr.core import Literal, inner_jaxprs, is_var, open_jaxpr
from mpjax._jaxpr.flatten import FlatFunction, flatten, refuse_modules
from mpjax._jaxpr.loops import Scan, While
from mpjax._jaxpr.primitives import Kind, facts_of
from mpjax._tree import is_inexact, refuse_deleted, squared_leaf
from mpjax.numerics import _causes
from mpjax.numerics._causes import NonFinite
from mpjax.numerics._eqn_context import EqnContext
from mpjax.numerics._findings import place
from mpjax.numerics._flow import AbstractValue, Flow, site_of
from mpjax.numerics._half_results import (
    Difference,
    History,
    follow,
    is_below_zero_by_rounding,
)


def find_nonfinite(fn: Callable[..., Any]) -> Callable[..., NonFinite | None]:
    """Finds which operation made the Inf or NaN that a function returns.

    It takes the function and returns a function: `find_nonfinite(fn)(*args)`.

    The function is traced. Where the outputs of a call or loop are not all finite, its
    operations are evaluated one by one: inside jit, remat, scan (iteration by
    iteration), while, cond and functions with custom derivatives, but not inside
    shard_map. An operation is not to blame if its Inf or NaN is masked later (by
    `jnp.where`, or an exponential of -Inf). A constant Inf, as in an attention mask, is
    not to blame either; the operation that makes a NaN of it is.

    Give it the function that went wrong: `jax.value_and_grad(loss_fn)` to include the
    backward pass, `autocast(jax.value_and_grad(loss_fn))` for half precision, or a
    whole train step, of which it also names the parameters whose gradients are not
    finite. Compiled code may keep float32 between operations on half; here each
    operation rounds.

    Args:
      fn: any function of pytrees that JAX can trace. Side effects such as
        `jax.debug.print` may happen more than once.

    Returns:
      A function with the arguments of `fn` that returns a `NonFinite`, or None if every
      output of `fn` is finite. Donated arguments stay usable.

    Raises:
      TypeError: when the returned function is called under jit, or with an NNX module.
      ValueError: for a state that was given to a train step before, which reused its
        memory.

    >>> def loss(w):
    ...     return jnp.sum(jnp.log(w) * 2.0)
    >>> found = find_nonfinite(loss)(jnp.array([1.0, 0.0]))
    >>> found.primitive, found.cause, found.largest_input
    ('log', 'logarithm of zero', 1.0)
    """

    def find(*args, **kwargs) -> NonFinite | None:
        refuse_modules(fn, args, kwargs)
        arrays, spec = flatten((args, kwargs))
        if any(isinstance(x, Tracer) for x in arrays):
            raise TypeError(
                "find_nonfinite needs numbers, and under jit there are none: call "
                "find_nonfinite(fn)(*args) outside of jit."
            )
        refuse_deleted(arrays)
        with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
            closed = jax.make_jaxpr(FlatFunction(fn, spec))(*arrays)
            values = [jnp.asarray(x) for x in arrays]
            outputs = _evaluate(closed, values)
            if not any(map(_is_bad, outputs)):
                return None
            paths = _paths(args, kwargs)
            inputs = [
                TrackedArray(x, _input_origin(x, path))
                for x, path in zip(values, paths, strict=True)
            ]
            interpreter = _Interpreter(closed)
            found = interpreter.run(closed, inputs, EqnContext())
        origins = [x.origin for x in found if x.origin is not None]
        record = min(origins, key=lambda origin: origin.order).record
        parameters = tuple(interpreter.parameters)
        return dataclasses.replace(record, parameters=parameters)

    return find


class Origin(NamedTuple):
    """Where the Inf or NaN of an array comes from.

    Attributes:
      order: sorts origins; the smallest came first.
      record: the `NonFinite` to report.
      is_constant: whether it is a constant, which alone is not to blame.
    """

    order: tuple[int, int]
    record: NonFinite
    is_constant: bool


class TrackedArray(NamedTuple):
    """An array, and what is known of it.

    Attributes:
      array: the array.
      origin: the origin of its Inf and NaN; None if it is finite.
      is_constant: whether it depends on no argument.
    """

    array: Any
    origin: Origin | None
    is_constant: bool = False


class _Interpreter:
    """Evaluates equations one by one, and tracks where Inf and NaN come from."""

    def __init__(self, jaxpr: Any):
        self._half_results = _HalfResults(jaxpr)
        # Differences of half results, by equation: whether rounding made one negative.
        self.rounded: dict[int, bool] = {}
        self.num_blamed = 0
        self.parameters: dict[str, None] = {}  # in order; their gradients are bad

    def run(
        self, jaxpr: Any, inputs: Sequence[TrackedArray], context: EqnContext
    ) -> list[TrackedArray]:
        body = open_jaxpr(jaxpr)
        consts = [
            TrackedArray(x, self._constant_origin(x), is_constant=True)
            for x in getattr(jaxpr, "consts", ())
        ]
        env = dict(
            zip((*body.constvars, *body.invars), (*consts, *inputs), strict=True)
        )

        def read(atom):
            if isinstance(atom, Literal):
                array = jnp.asarray(atom.val, dtype=_jaxpr.dtype_of(atom))
                origin = self._constant_origin(array)
                return TrackedArray(array, origin, is_constant=True)
            return env[atom]

        last_uses = {
            v: i for i, e in enumerate(body.eqns) for v in _variables(e.invars)
        }
        kept = set(_variables(body.outvars))
        for i, eqn in enumerate(body.eqns):
            operands = [read(x) for x in eqn.invars]
            outputs = self._equation(eqn, operands, context.enter(eqn))
            if all(x.is_constant for x in operands):
                outputs = [x._replace(is_constant=True) for x in outputs]
            env.update(zip(eqn.outvars, outputs, strict=True))
            for v in {*_variables(eqn.invars), *eqn.outvars} - kept:
                if last_uses.get(v, i) <= i:
                    env.pop(v, None)
        return [read(x) for x in body.outvars]

    def _equation(
        self, eqn: Any, operands: list[TrackedArray], context: EqnContext
    ) -> list[TrackedArray]:
        facts = facts_of(eqn)
        arrays = [x.array for x in operands]
        parameter = squared_leaf(context.scope)
        if parameter is not None and any(map(_is_bad, arrays)):
            self.parameters[parameter] = None
        if facts.is_call:
            (jaxpr, *_) = inner_jaxprs(eqn)
            return self._call(jaxpr, operands, context)
        if facts.kind is Kind.COND:
            branch = eqn.params["branches"][int(arrays[0])]
            return self._call(branch, operands[1:], context)
        outputs = _jaxpr.bind(eqn, *arrays)
        if not any(map(_is_bad, outputs)):
            if facts.is_addition and self._half_results.is_difference(eqn):
                is_rounded = is_below_zero_by_rounding(arrays, outputs[0])
                self.rounded[id(eqn)] = is_rounded
            return [TrackedArray(x, None) for x in outputs]
        if eqn.primitive.name == "custom_linear_solve":
            return self._linear_solve(eqn, operands, context)
        if facts.kind is Kind.LOOP:
            loop = self._scan if eqn.primitive.name == "scan" else self._while
            return loop(eqn, operands, context)
        self.num_blamed += 1
        origin = self._blame(eqn, operands, outputs, context)
        return [TrackedArray(x, origin if _is_bad(x) else None) for x in outputs]

    def _call(self, jaxpr, operands, context) -> list[TrackedArray]:
        outputs = _evaluate(jaxpr, [x.array for x in operands])
        if not any(map(_is_bad, outputs)):
            return [TrackedArray(x, None) for x in outputs]
        return self.run(jaxpr, operands, context)

    def _linear_solve(self, eqn, operands, context) -> list[TrackedArray]:
        lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
        first = lengths.matvec + lengths.vecmat
        consts = operands[first : first + lengths.solve]
        vectors = operands[sum(lengths) :]
        return self._call(jaxprs.solve, [*consts, *vectors], context)

    def _scan(self, eqn, operands, context) -> list[TrackedArray]:
        scan = Scan(eqn)
        consts, carry, xs = scan.split_operands(operands)
        steps = range(scan.length)
        rows: list[list[TrackedArray]] = [[] for _ in steps]
        for i in reversed(steps) if scan.is_reverse else steps:
            row = [
                TrackedArray(x.array[i], _origin_in(x.origin, x.array[i])) for x in xs
            ]
            inputs = [*consts, *carry, *row]
            outputs = self._call(scan.jaxpr, inputs, context.at(i))
            carry, rows[i] = scan.split_results(outputs)
        stacked = [
            TrackedArray(jnp.stack([y.array for y in ys]), _first(y.origin for y in ys))
            for ys in zip(*rows, strict=True)
        ]
        return [*carry, *stacked]

    def _while(self, eqn, operands, context) -> list[TrackedArray]:
        loop = While(eqn)
        cond_consts, body_consts, carry = loop.split_operands(operands)
        i = 0
        while True:
            values = [x.array for x in (*cond_consts, *carry)]
            (goes_on,) = _evaluate(loop.cond, values)
            if not bool(goes_on):
                return carry
            carry = self._call(loop.body, [*body_consts, *carry], context.at(i))
            i += 1

    def _blame(self, eqn, operands, outputs, context) -> Origin:
        """Returns the origin of an equation's Inf or NaN: an operand's, or its own."""
        has_nan = any(_causes.count(x)[0] for x in outputs if is_inexact(x))
        culprits = [x.origin for x in operands if x.origin and not x.origin.is_constant]
        if culprits:
            return min(culprits, key=lambda origin: origin.order)
        constants = [x.origin for x in operands if x.origin]
        if constants and not has_nan:
            finite = [_without_nonfinite(x.array) for x in operands]
            if not any(map(_is_bad, _jaxpr.bind(eqn, *finite))):
                return constants[0]
        if constants and any(origin.record.num_nan for origin in constants):
            return constants[0]
        for origin in constants:
            if origin.record.cause == _causes.CONSTANT_CAST:
                return origin._replace(is_constant=False)
        arrays = [x.array for x in operands]
        bad = next(x for x in outputs if _is_bad(x))
        num_nan, num_inf, index = _causes.count(bad)
        cause, matmul = _causes.find_cause(eqn, arrays, outputs), ""
        is_constant = all(x.is_constant for x in operands)
        if cause == _causes.HALF_OVERFLOW and is_constant and not context.is_backward:
            cause = _causes.CONSTANT_CAST
        difference = self._half_results.difference_in(eqn)
        # Where a compiled call computed it, the numbers are unknown.
        is_rounded = difference and self.rounded.get(id(difference.eqn), True)
        if difference and is_rounded and cause in _OF_SMALL_NUMBERS:
            cause, matmul = _causes.CANCELLATION, place(difference.matmul)
        record = NonFinite(
            cause=cause,
            matmul=matmul,
            primitive=eqn.primitive.name,
            scope=context.scope,
            source=context.source,
            is_backward=context.is_backward and not context.is_rematerialized,
            dtype=str(bad.dtype),
            shape=tuple(bad.shape),
            num_nan=num_nan,
            num_inf=num_inf,
            index=index,
            largest_input=_causes.largest_finite(arrays),
            iterations=context.iterations,
        )
        is_cast = cause == _causes.CONSTANT_CAST
        return Origin((1, self.num_blamed), record, is_constant=is_cast)

    def _constant_origin(self, x: Any) -> Origin | None:
        if not _is_bad(x):
            return None
        return Origin((2, 0), _describe(x, _causes.CONSTANT), is_constant=True)


_OF_SMALL_NUMBERS = (
    _causes.OUT_OF_DOMAIN,
    _causes.DIVISION_BY_ZERO,
    _causes.LOG_OF_ZERO,
)


class _HalfResults:
    """What half matmuls made, by the equations that take it."""

    def __init__(self, jaxpr: Any):
        """Follows them through a jaxpr, without computing anything."""
        self._operands: dict[int, list[History]] = {}
        self._differences: set[int] = set()
        inputs = [AbstractValue(is_constant=False) for _ in open_jaxpr(jaxpr).invars]
        Flow(self._rule, lambda *_: None).run(jaxpr, inputs, EqnContext())

    def is_difference(self, eqn: Any) -> bool:
        """Whether it is a sum or difference in which a half matmul takes part."""
        return id(eqn) in self._differences

    def difference_in(self, eqn: Any) -> Difference | None:
        """Returns the difference that an operand of an equation was made of, if any."""
        histories = self._operands.get(id(eqn), [])
        return next((h.difference for h in histories if h.difference), None)

    def _rule(self, eqn, values, context) -> AbstractValue:
        histories = [v.history for v in values]
        self._operands[id(eqn)] = histories
        history = follow(eqn, histories, site_of(eqn, context), context.times)
        if history.difference is not None and history.difference.eqn is eqn:
            self._differences.add(id(eqn))
        return AbstractValue(is_constant=False, history=history)


@functools.lru_cache(maxsize=256)
def _compiled(body: Any) -> Any:
    return jax.jit(functools.partial(_jaxpr.eval_jaxpr, body))


def _evaluate(jaxpr: Any, values: list[Any]) -> list[Any]:
    """Evaluates a jaxpr as compiled code, without donating arguments."""
    return _compiled(open_jaxpr(jaxpr))(list(getattr(jaxpr, "consts", ())), *values)


def _describe(x: Any, cause: str, leaf: str = "") -> NonFinite:
    num_nan, num_inf, index = _causes.count(x)
    return NonFinite(
        cause, "", "", "", False, str(x.dtype), tuple(x.shape), num_nan, num_inf, index,
        _causes.largest_finite([x]), leaf=leaf,
    )  # fmt: skip


def _input_origin(x: Any, path: str) -> Origin | None:
    if not _is_bad(x):
        return None
    return Origin((0, 0), _describe(x, _causes.INPUT, path), is_constant=False)


def _origin_in(origin: Origin | None, part: Any) -> Origin | None:
    """Returns the origin for a part of an array: None if the part is finite."""
    return origin if origin is not None and _is_bad(part) else None


def _first(origins: Iterable[Origin | None]) -> Origin | None:
    found = [origin for origin in origins if origin is not None]
    return min(found, key=lambda origin: origin.order) if found else None


def _is_bad(x: Any) -> bool:
    return is_inexact(x) and not bool(jnp.all(jnp.isfinite(x)))


def _without_nonfinite(x: Any) -> Any:
    return jnp.where(jnp.isfinite(x), x, 0).astype(x.dtype) if is_inexact(x) else x


def _variables(atoms: Any) -> list[Any]:
    return [x for x in atoms if is_var(x)]


def _paths(args: Any, kwargs: Any) -> list[str]:
    """Returns the path of each array that `flatten` finds in the arguments."""
    leaves = jax.tree_util.tree_leaves_with_path((args, kwargs))
    paths = []
    for path, leaf in leaves:
        arrays, _ = flatten(leaf)
        name = "args" if path[0].idx == 0 else "kwargs"
        paths += [name + jax.tree_util.keystr(path[1:])] * len(arrays)
    return paths
