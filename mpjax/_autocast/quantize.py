"""Writes in float8 the matmuls for which a policy asks for it.

Each operand is quantized once, whichever matmuls of a jaxpr take it. A constant of a
scan is quantized before the scan, so that a weight is quantized once per step and not
once per microbatch; XLA does the same for operands that several functions share.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpjax._autocast.float8 import (
    Matmul,
    Quantized,
    axes_to_share,
    float8_matmul,
    quantize,
)
from mpjax._autocast.inline import empty_call
from mpjax._jaxpr.core import (
    MadeFloat8,
    Var,
    dtype_of,
    from_source_of,
    inner_jaxprs,
    is_inexact_aval,
    is_var,
    map_inner_jaxprs,
    may_change_operands,
    open_jaxpr,
    trace_call,
    walk,
    with_equations,
)
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.passes import ENTERED
from mpjax._jaxpr.primitives import Kind, facts_of
from mpjax._jaxpr.provenance import FLOAT8_MATMUL, is_backward
from mpjax.policy import Float8Policy


class MadeFloat8Call(dict):
    """Parameters of a call of `float8_matmul`, which know what it multiplies."""

    def __init__(self, params: Any, matmul: Matmul):
        super().__init__(params)
        self.matmul = matmul


def quantize_matmuls(jaxpr: Any) -> Any:
    """Returns a jaxpr with the matmuls in float8 that autocast has marked for it.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """
    if not any(isinstance(eqn.params, MadeFloat8) for eqn, _, _ in walk(jaxpr)):
        return jaxpr
    inputs = _read_by_backward_pass(jaxpr)
    return _Quantizer().rewrite(jaxpr, inputs, (False,) * len(inputs), False).jaxpr


def with_float32_result(eqn: Any, out: Var) -> Any:
    """Returns a float8 matmul with another result, in float32.

    Args:
      eqn: an equation whose parameters are a `MadeFloat8Call`.
      out: float32 variable.
    """
    return _matmul_eqn(eqn, eqn.params.matmul._replace(dtype=dtype_of(out)), out)


class _Rewritten(NamedTuple):
    """A jaxpr after the pass.

    Attributes:
      jaxpr: the jaxpr; its inputs end with two more, values and exponent, for each
        quantized constant.
      are_cotangents: whether each output is a cotangent.
      constants: the index of each input that is to be quantized outside, and a dtype.
    """

    jaxpr: Any
    are_cotangents: tuple[bool, ...]
    constants: tuple[tuple[int, Any], ...]


class _Quantizer:
    """Rewrites jaxprs, once per jaxpr and what its inputs are."""

    def __init__(self):
        self._done: dict[Any, tuple[Any, _Rewritten]] = {}

    def rewrite(
        self,
        jaxpr: Any,
        are_cotangents: tuple[bool, ...],
        are_constants: tuple[bool, ...],
        in_backward: bool,
    ) -> _Rewritten:
        """Rewrites a jaxpr and all inside it.

        Args:
          jaxpr: closed or open.
          are_cotangents: whether each input is a cotangent.
          are_constants: whether each input is a constant of a scan around it, and may
            be quantized there.
          in_backward: whether it belongs to a backward pass.
        """
        key = (id(jaxpr), are_cotangents, are_constants, in_backward)
        if key not in self._done:
            rewriter = _JaxprQuantizer(self, jaxpr, key[1:])
            self._done[key] = (jaxpr, rewriter.run())
        return self._done[key][1]


class _JaxprQuantizer:
    """Rewrites one jaxpr; the arguments are those of `_Quantizer.rewrite`."""

    def __init__(self, quantizer: _Quantizer, jaxpr: Any, inputs: Any):
        are_cotangents, are_constants, self._in_backward = inputs
        self._quantizer = quantizer
        self._jaxpr = jaxpr
        body = self._body = open_jaxpr(jaxpr)
        pairs = list(enumerate(body.invars))
        self._cotangents = {v for i, v in pairs if are_cotangents[i]}
        self._constants = {v: i for i, v in pairs if are_constants[i]}
        self._sources: dict[Var, Var] = {}
        self._ones: set[Var] = set()
        self._quantized: dict[tuple[Var, Any], list[Var]] = {}
        self._lifted: list[tuple[int, Any]] = []
        self._new_inputs: list[Var] = []
        self._eqns: list[Any] = []

    def run(self) -> _Rewritten:
        """Rewrites all equations."""
        body = self._body
        for eqn in body.eqns:
            self._rewrite(eqn)
        is_same = len(self._eqns) == len(body.eqns) and all(
            new is old for new, old in zip(self._eqns, body.eqns, strict=True)
        )
        jaxpr = self._jaxpr
        if not is_same:
            effects = set(body.effects).union(*(eqn.effects for eqn in self._eqns))
            jaxpr = with_equations(
                jaxpr,
                invars=[*body.invars, *self._new_inputs],
                eqns=self._eqns,
                effects=effects,
            )
        out = tuple(is_var(x) and x in self._cotangents for x in body.outvars)
        return _Rewritten(jaxpr, out, tuple(self._lifted))

    def _rewrite(self, eqn: Any) -> None:
        facts = facts_of(eqn)
        if isinstance(eqn.params, MadeFloat8):
            self._matmul(eqn)
        elif eqn.primitive.name == "scan":
            self._scan(eqn)
        elif facts.kind in ENTERED and inner_jaxprs(eqn):
            self._call(eqn)
        else:
            self._eqns.append(eqn)
            self._mark(eqn, [self._returns_cotangent(eqn)] * len(eqn.outvars))
        moves = facts.moves_data or facts.keeps_constant
        if moves and all(map(self._is_one, eqn.invars)):
            self._ones |= set(eqn.outvars)
        source = _source_of(eqn)
        if source is not None:
            self._sources[eqn.outvars[0]] = self._sources.get(source, source)

    def _returns_cotangent(self, eqn: Any) -> bool:
        """Whether an equation computes cotangents: of another one, or of nothing."""
        if not is_backward(eqn, self._in_backward):
            return False
        has_operands = any(is_var(x) for x in eqn.invars)
        return not has_operands or any(self._are_cotangents(eqn))

    def _are_cotangents(self, eqn: Any) -> tuple[bool, ...]:
        """Returns whether each operand is a cotangent; that of the loss is 1."""
        facts = facts_of(eqn)
        is_linear = facts.is_proportional or facts.is_matmul or inner_jaxprs(eqn)
        may_begin = is_linear and is_backward(eqn, self._in_backward)
        return tuple(
            (is_var(x) and x in self._cotangents) or bool(may_begin and self._is_one(x))
            for x in eqn.invars
        )

    def _is_one(self, atom: Any) -> bool:
        if is_var(atom):
            return atom in self._ones
        is_scalar = _is_float(atom) and jnp.ndim(atom.val) == 0
        return is_scalar and float(atom.val) == 1

    def _mark(self, eqn: Any, are_cotangents: Any) -> None:
        pairs = zip(eqn.outvars, are_cotangents, strict=True)
        self._cotangents |= {v for v, is_one in pairs if is_one and _is_float(v)}

    def _matmul(self, eqn: Any) -> None:
        x, y = eqn.invars
        first, second = self._are_cotangents(eqn)
        value, cotangent = Float8Policy.value_dtype, Float8Policy.cotangent_dtype
        # Of two cotangents, as a second derivative may have, one is taken as a value:
        # no hardware multiplies two arrays in e5m2.
        x8 = self._quantize(x, cotangent if first else value, eqn)
        y8 = self._quantize(y, cotangent if second and not first else value, eqn)
        matmul = Matmul(eqn.params["dimension_numbers"], dtype_of(eqn.outvars[0]))
        call = eqn.replace(invars=[x, y, *x8, *y8])
        self._eqns.append(_matmul_eqn(call, matmul, eqn.outvars[0]))
        self._mark(eqn, [self._returns_cotangent(eqn)])

    def _quantize(self, x: Var, dtype: Any, like: Any) -> list[Var]:
        """Returns the variables of a quantized array: values and exponent."""
        source = self._sources.get(x, x)
        key = (source, dtype)
        if key not in self._quantized:
            call = _quantize_eqn(x, dtype, like)
            self._quantized[key] = call.outvars
            if source in self._constants:
                self._lifted.append((self._constants[source], dtype))
                self._new_inputs += call.outvars
            else:
                self._eqns.append(call)
        return self._quantized[key]

    def _inside(self, eqn: Any, jaxpr: Any, inputs: Any, constants: Any) -> _Rewritten:
        in_backward = is_backward(eqn, self._in_backward)
        return self._quantizer.rewrite(jaxpr, inputs, constants, in_backward)

    def _lift(self, eqn: Any, inner: _Rewritten) -> list[Var]:
        """Returns the operands that a rewritten jaxpr takes in addition."""
        found = []
        for index, dtype in inner.constants:
            found += self._quantize(eqn.invars[index], dtype, eqn)
        return found

    def _call(self, eqn: Any) -> None:
        """Rewrites the jaxprs inside a call, a conditional or a while loop."""
        inner, operands = inner_jaxprs(eqn), list(eqn.invars)
        skipped = 1 if eqn.primitive.name == "cond" else 0
        inputs = self._are_cotangents(eqn)[skipped:]
        constants = (False,) * len(inputs)
        facts = facts_of(eqn)
        if facts.kind is Kind.CALL and facts.is_call:
            constants = tuple(self._is_constant(x) for x in eqn.invars)
        results = []

        def rewrite(jaxpr):
            num = len(open_jaxpr(jaxpr).invars)
            is_known = num == len(inputs)
            unknown = (False,) * num
            results.append(
                self._inside(
                    eqn,
                    jaxpr,
                    inputs if is_known else unknown,
                    constants if is_known else unknown,
                )
            )
            return results[-1].jaxpr

        params = map_inner_jaxprs(rewrite, eqn.params)
        new = self._lift(eqn, results[0]) if len(results) == 1 else []
        if new and eqn.primitive.name == "jit":
            more = empty_call(len(new), 0).params
            for name in ("in_shardings", "in_layouts", "donated_invars"):
                params[name] = (*params[name], *more[name])
        self._write(eqn, inner, results, params, [*operands, *new])
        outs = [x.are_cotangents for x in results]
        is_known = all(len(x) == len(eqn.outvars) for x in outs)
        joined = [any(x) for x in zip(*outs, strict=True)] if is_known else []
        self._mark(eqn, joined or [any(inputs)] * len(eqn.outvars))

    def _scan(self, eqn: Any) -> None:
        scan = Scan(eqn)
        inputs = self._are_cotangents(eqn)
        may_lift = may_change_operands(eqn)
        consts, carry, xs = scan.split_operands(inputs)
        constants = [may_lift and is_var(x) for x in eqn.invars[: len(consts)]]
        constants = (*constants, *[False] * (len(carry) + len(xs)))
        while True:
            inside = (*consts, *carry, *xs)
            inner = self._inside(eqn, scan.jaxpr, inside, constants)
            carried, _ = scan.split_results(inner.are_cotangents)
            joined = [a or b for a, b in zip(carry, carried, strict=True)]
            if joined == carry:
                break
            carry = joined
        self._mark(eqn, inner.are_cotangents)
        if inner.jaxpr is scan.jaxpr:
            self._eqns.append(eqn)
            return
        new = self._lift(eqn, inner)
        outer = scan.split_operands(eqn.invars)
        body = open_jaxpr(inner.jaxpr)
        num_old = len(eqn.invars)
        own = scan.split_operands(body.invars[:num_old])
        jaxpr = with_equations(
            inner.jaxpr,
            invars=[*own[0], *body.invars[num_old:], *own[1], *own[2]],
        )
        rebuilt = scan.rebuild(
            jaxpr,
            num_consts=scan.num_consts + len(new),
            invars=[*outer[0], *new, *outer[1], *outer[2]],
        )
        self._eqns.append(_with_effects(rebuilt, jaxpr))

    def _write(self, eqn: Any, old: Any, results: Any, params: Any, invars: Any):
        """Writes an equation with other jaxprs inside; itself if they are the same."""
        if all(x.jaxpr is jaxpr for x, jaxpr in zip(results, old, strict=True)):
            self._eqns.append(eqn)
            return
        new = eqn.replace(params=params, invars=invars)
        is_local = eqn.primitive.name == "shard_map"
        for jaxpr in () if is_local else inner_jaxprs(new):
            new = _with_effects(new, jaxpr)
        self._eqns.append(new)

    def _is_constant(self, atom: Any) -> bool:
        return is_var(atom) and self._sources.get(atom, atom) in self._constants


def _with_effects(eqn: Any, jaxpr: Any) -> Any:
    return eqn.replace(effects=set(eqn.effects) | set(open_jaxpr(jaxpr).effects))


def _read_by_backward_pass(jaxpr: Any) -> tuple[bool, ...]:
    """Returns whether each input is read, and by equations of a backward pass alone.

    That is how a cotangent looks that a function takes as an argument.
    """
    readers: dict[Var, bool] = {}
    for eqn in open_jaxpr(jaxpr).eqns:
        for x in filter(is_var, eqn.invars):
            readers[x] = is_backward(eqn) and readers.get(x, True)
    return tuple(readers.get(x, False) for x in open_jaxpr(jaxpr).invars)


def _is_float(atom: Any) -> bool:
    return is_inexact_aval(atom.aval)


def _source_of(eqn: Any) -> Var | None:
    """Returns the variable that an equation casts, or hands on in another form."""
    if eqn.primitive.name == "convert_element_type":
        (x,) = eqn.invars
        return x if is_var(x) and _is_float(x) else None
    if eqn.primitive.name != "custom_jvp_call":
        return None
    body = open_jaxpr(inner_jaxprs(eqn)[0])
    (out, *others), names = (
        body.outvars,
        dict(zip(body.invars, eqn.invars, strict=True)),
    )
    source = names.get(out) if is_var(out) and not others else None
    return source if source is not None and is_var(source) else None


def _quantize_eqn(x: Var, dtype: Any, like: Any) -> Any:
    """Returns the equation that quantizes a variable."""
    call = _trace_quantize(x.aval, dtype, like.ctx)
    values, exponent = (Var(v.aval) for v in call.outvars)
    return call.replace(
        invars=[x],
        outvars=[values, exponent],
        params=map_inner_jaxprs(lambda x: from_source_of(like, x), call.params),
        source_info=like.source_info,
    )


def _matmul_eqn(call: Any, matmul: Matmul, out: Var) -> Any:
    """Returns the equation of a float8 matmul, with the operands of another."""
    avals = tuple(x.aval for x in call.invars)
    traced = _trace_matmul(avals, matmul, call.ctx)
    params = map_inner_jaxprs(lambda x: from_source_of(call, x), traced.params)
    return traced.replace(
        invars=call.invars,
        outvars=[out],
        params=MadeFloat8Call(params, matmul),
        source_info=call.source_info,
    )


@functools.lru_cache(maxsize=1024)
def _trace_quantize(aval: Any, dtype: Any, context: Any) -> Any:
    axes = axes_to_share(aval)

    def quantize_float8(x):
        return quantize(x, dtype, axes)

    return trace_call(jax.jit(quantize_float8), [aval], context)


@functools.lru_cache(maxsize=1024)
def _trace_matmul(avals: Any, matmul: Matmul, context: Any) -> Any:
    def multiply(x, y, *quantized):
        x8, y8 = Quantized(*quantized[:2]), Quantized(*quantized[2:])
        return float8_matmul(matmul, x, y, x8, y8)

    multiply.__name__ = multiply.__qualname__ = FLOAT8_MATMUL
    return trace_call(jax.jit(multiply), avals, context)
