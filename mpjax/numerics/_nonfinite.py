"""Finds the operation that made the first Inf or NaN, by evaluating a jaxpr."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mpjax._jaxpr import core as _jaxpr
from mpjax._jaxpr.core import Literal, inner_jaxprs, open_jaxpr
from mpjax._jaxpr.flatten import FlatFunction, flatten, refuse_modules
from mpjax._jaxpr.loops import Scan
from mpjax.numerics import _causes
from mpjax.numerics._causes import NonFinite, is_inexact
from mpjax.numerics._place import Place

_CALLS = frozenset(
    (
        "jit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "eval_jaxpr",
        "remat2",
    )
)


def find_nonfinite(fn: Callable[..., Any]) -> Callable[..., NonFinite | None]:
    """Finds which operation made the Inf or NaN that a function returns.

    The function is traced, and evaluated operation by operation wherever the output of
    a whole is not finite: into jit, remat, scan (which iteration), while, cond and
    functions with derivatives of their own; not into shard_map. What is masked again
    (`jnp.where`, an exponential of -Inf) is not to blame, nor is a constant Inf, as of
    a mask; the operation that makes NaN of it is.

    Give it the function that went wrong: `jax.value_and_grad(loss_fn)` for the backward
    pass too, `autocast(jax.value_and_grad(loss_fn))` in half precision, or a train
    step. Compiled code may keep float32 between operations on half; here each
    operation rounds.

    Args:
      fn: any function of pytrees that JAX can trace. Side effects such as
        `jax.debug.print` may happen more than once.

    Returns:
      A function that takes the arguments of `fn` and returns a `NonFinite`, or None if
      every output of `fn` is finite. Donated arguments stay usable.

    Raises:
      TypeError: when called under jit, or with an NNX module.

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
                "find_nonfinite looks at numbers, and under jit there are none: call "
                "it outside, find_nonfinite(fn)(*args)."
            )
        with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
            closed = jax.make_jaxpr(FlatFunction(fn, spec))(*arrays)
            values = [jnp.asarray(x) for x in arrays]
            outputs = _evaluate(closed, values)
            if not any(map(_is_bad, outputs)):
                return None
            paths = _paths(args, kwargs)
            inputs = [
                Value(x, _input_origin(x, path))
                for x, path in zip(values, paths, strict=True)
            ]
            found = _Interpreter().run(closed, inputs, Place())
        origins = [x.origin for x in found if x.origin is not None]
        return min(origins, key=lambda origin: origin.order).record

    return find


class Origin(NamedTuple):
    """Where the Inf or NaN of a value is from.

    Attributes:
      order: which came first.
      record: what is said of it.
      is_constant: whether it is a constant Inf, which is nobody's fault.
    """

    order: tuple[int, int]
    record: NonFinite
    is_constant: bool


class Value(NamedTuple):
    """An array, and the origin of what is not finite in it, None if all is."""

    array: Any
    origin: Origin | None


class _Interpreter:
    """Evaluates equations one by one, and follows what is not finite."""

    def __init__(self):
        self.num_evaluated = 0

    def run(self, jaxpr: Any, inputs: Sequence[Value], place: Place) -> list[Value]:
        body = open_jaxpr(jaxpr)
        consts = [
            Value(x, self._constant_origin(x)) for x in getattr(jaxpr, "consts", ())
        ]
        env = dict(
            zip((*body.constvars, *body.invars), (*consts, *inputs), strict=True)
        )

        def read(atom):
            if isinstance(atom, Literal):
                array = jnp.asarray(atom.val, dtype=_jaxpr.dtype_of(atom))
                return Value(array, self._constant_origin(array))
            return env[atom]

        last_uses = {
            v: i for i, e in enumerate(body.eqns) for v in _variables(e.invars)
        }
        kept = set(_variables(body.outvars))
        for i, eqn in enumerate(body.eqns):
            operands = [read(x) for x in eqn.invars]
            outputs = self._equation(eqn, operands, place.enter(eqn))
            env.update(zip(eqn.outvars, outputs, strict=True))
            for v in {*_variables(eqn.invars), *eqn.outvars} - kept:
                if last_uses.get(v, i) <= i:
                    env.pop(v, None)
        return [read(x) for x in body.outvars]

    def _equation(self, eqn: Any, operands: list[Value], place: Place) -> list[Value]:
        name = eqn.primitive.name
        arrays = [x.array for x in operands]
        if name in _CALLS:
            (jaxpr, *_) = inner_jaxprs(eqn)
            return self._call(jaxpr, operands, place)
        if name == "cond":
            branch = eqn.params["branches"][int(arrays[0])]
            return self._call(branch, operands[1:], place)
        if name in ("scan", "while"):
            outputs = _jaxpr.bind(eqn, *arrays)
            if not any(map(_is_bad, outputs)):
                return [Value(x, None) for x in outputs]
            loop = self._scan if name == "scan" else self._while
            return loop(eqn, operands, place)
        outputs = _jaxpr.bind(eqn, *arrays)
        self.num_evaluated += 1
        if not any(map(_is_bad, outputs)):
            return [Value(x, None) for x in outputs]
        origin = self._blame(eqn, operands, outputs, place)
        return [Value(x, origin if _is_bad(x) else None) for x in outputs]

    def _call(self, jaxpr, operands, place) -> list[Value]:
        outputs = _evaluate(jaxpr, [x.array for x in operands])
        if not any(map(_is_bad, outputs)):
            return [Value(x, None) for x in outputs]
        return self.run(jaxpr, operands, place)

    def _scan(self, eqn, operands, place) -> list[Value]:
        params = eqn.params
        num_consts, num_carry = (Scan(eqn).num_consts, Scan(eqn).num_carry)
        consts, carry, xs = _split(operands, num_consts, num_carry)
        length = params["length"]
        steps = range(length)
        rows: list[list[Value]] = [[] for _ in steps]
        for i in reversed(steps) if params["reverse"] else steps:
            piece = [Value(x.array[i], _of(x.origin, x.array[i])) for x in xs]
            outputs = self._call(
                params["jaxpr"], [*consts, *carry, *piece], place.at(i)
            )
            carry, rows[i] = outputs[:num_carry], outputs[num_carry:]
        stacked = [
            Value(jnp.stack([y.array for y in ys]), _first([y.origin for y in ys]))
            for ys in zip(*rows, strict=True)
        ]
        return [*carry, *stacked]

    def _while(self, eqn, operands, place) -> list[Value]:
        params = eqn.params
        cond_consts, body_consts, carry = _split(
            operands, params["cond_nconsts"], params["body_nconsts"]
        )
        i = 0
        while True:
            values = [x.array for x in (*cond_consts, *carry)]
            (goes_on,) = _evaluate(params["cond_jaxpr"], values)
            if not bool(goes_on):
                return carry
            carry = self._call(
                params["body_jaxpr"], [*body_consts, *carry], place.at(i)
            )
            i += 1

    def _blame(self, eqn, operands, outputs, place) -> Origin:
        """Returns the origin of what an equation gave: an operand's, or itself."""
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
        arrays = [x.array for x in operands]
        bad = next(x for x in outputs if _is_bad(x))
        num_nan, num_inf, index = _causes.count(bad)
        record = NonFinite(
            cause=_causes.find_cause(eqn, arrays, outputs),
            primitive=eqn.primitive.name,
            scope=place.scope,
            source=place.source,
            is_backward=place.is_backward and not place.is_recomputed,
            dtype=str(bad.dtype),
            shape=tuple(bad.shape),
            num_nan=num_nan,
            num_inf=num_inf,
            index=index,
            largest_input=_causes.largest_finite(arrays),
            iterations=place.iterations,
        )
        return Origin((1, self.num_evaluated), record, is_constant=False)

    def _constant_origin(self, x: Any) -> Origin | None:
        if not _is_bad(x):
            return None
        return Origin((2, 0), _describe(x, _causes.CONSTANT), is_constant=True)


@functools.lru_cache(maxsize=256)
def _compiled(body: Any) -> Any:
    return jax.jit(functools.partial(_jaxpr.eval_jaxpr, body))


def _evaluate(jaxpr: Any, values: list[Any]) -> list[Any]:
    """Evaluates a jaxpr as compiled code, donating nothing."""
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


def _of(origin: Origin | None, part: Any) -> Origin | None:
    return origin if origin is not None and _is_bad(part) else None


def _first(origins: Sequence[Origin | None]) -> Origin | None:
    found = [origin for origin in origins if origin is not None]
    return min(found, key=lambda origin: origin.order) if found else None


def _is_bad(x: Any) -> bool:
    return is_inexact(x) and not bool(jnp.all(jnp.isfinite(x)))


def _without_nonfinite(x: Any) -> Any:
    return jnp.where(jnp.isfinite(x), x, 0).astype(x.dtype) if is_inexact(x) else x


def _split(values: list[Value], first: int, second: int) -> tuple[list[Value], ...]:
    return values[:first], values[first : first + second], values[first + second :]


def _variables(atoms: Any) -> list[Any]:
    return [x for x in atoms if not isinstance(x, Literal)]


def _paths(args: Any, kwargs: Any) -> list[str]:
    """Returns the path of every array that `flatten` finds in the arguments."""
    leaves = jax.tree_util.tree_leaves_with_path((args, kwargs))
    paths = []
    for path, leaf in leaves:
        arrays, _ = flatten(leaf)
        name = "args" if path[0].idx == 0 else "kwargs"
        paths += [name + jax.tree_util.keystr(path[1:])] * len(arrays)
    return paths
