"""Writes in float8 the matmuls for which a policy asks for it.

Each operand is quantized once, whichever matmuls of a jaxpr take it. What a scan takes
is quantized before the scan: a constant as a whole, so that a weight is quantized once
per step and not once per microbatch, and a stack of weights layer by layer, once for
the forward and the backward loop. XLA does the same for what several functions share.
"""

import collections
from typing import Any, NamedTuple

import jax.numpy as jnp

from mpjax._autocast.float8 import Matmul
from mpjax._autocast.float8_equations import matmul_eqn, quantize_eqn
from mpjax._autocast.inline import empty_call
from mpjax._jaxpr.core import (
    MadeFloat8,
    Var,
    dtype_of,
    inner_jaxprs,
    is_inexact_aval,
    is_var,
    map_inner_jaxprs,
    may_change_operands,
    open_jaxpr,
    walk,
    with_equations,
)
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.passes import ENTERED
from mpjax._jaxpr.primitives import Kind, facts_of
from mpjax._jaxpr.provenance import is_backward
from mpjax.policy import Float8Policy


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
    return _Quantizer(jaxpr).rewrite(jaxpr, inputs, (False,) * len(inputs), False).jaxpr


class _Lifted(NamedTuple):
    """An input of a jaxpr that is to be quantized outside of it.

    Attributes:
      position: of the input.
      dtype: a float8 dtype.
      num_stacked: as in `quantize`.
    """

    position: int
    dtype: Any
    num_stacked: int


class _Rewritten(NamedTuple):
    """A jaxpr after the pass.

    Attributes:
      jaxpr: the jaxpr; its inputs end with two more, values and exponent, for each
        that is quantized outside.
      are_cotangents: whether each output is a cotangent.
      lifted: the inputs that are to be quantized outside.
    """

    jaxpr: Any
    are_cotangents: tuple[bool, ...]
    lifted: tuple[_Lifted, ...]


class _Quantizer:
    """Rewrites jaxprs, once per jaxpr and what its inputs are."""

    def __init__(self, outermost: Any):
        self.outermost = outermost
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
          are_constants: whether each input is given to a scan around it, as a whole or
            step by step, and may be quantized there.
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
        # What is known at the beginning only where a scan gave it; what scans computed.
        self._unknown = set(() if jaxpr is quantizer.outermost else body.invars)
        scans = [Scan(e) for e in body.eqns if e.primitive.name == "scan"]
        stacks = [scan.split_operands(scan.eqn.invars)[2] for scan in scans]
        self._num_scans = collections.Counter(
            x for xs in stacks for x in set(filter(is_var, xs))
        )
        self._quantized: dict[tuple[Var, Any, int], list[Var]] = {}
        self._lifted: list[_Lifted] = []
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
        params, dtype = eqn.params, dtype_of(eqn.outvars[0])
        matmul = Matmul(params["dimension_numbers"], dtype, params.all_sizes)
        call = eqn.replace(invars=[x, y, *x8, *y8])
        self._eqns.append(matmul_eqn(call, matmul, eqn.outvars[0]))
        self._mark(eqn, [self._returns_cotangent(eqn)])

    def _quantize(
        self, x: Var, dtype: Any, like: Any, num_stacked: int = 0
    ) -> list[Var]:
        """Returns the variables of a quantized array: values and exponent."""
        source = self._sources.get(x, x)
        key = (source, dtype, num_stacked)
        if key not in self._quantized:
            call = quantize_eqn(x, dtype, num_stacked, like)
            self._quantized[key] = call.outvars
            if source in self._constants:
                index = self._constants[source]
                self._lifted.append(_Lifted(index, dtype, num_stacked))
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
        for position, dtype, num_stacked in inner.lifted:
            found += self._quantize(eqn.invars[position], dtype, eqn, num_stacked)
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
        consts, carry, xs = scan.split_operands(self._are_cotangents(eqn))
        constants = self._liftable(scan)
        while True:
            inside = (*consts, *carry, *xs)
            inner = self._inside(eqn, scan.jaxpr, inside, constants)
            carried, _ = scan.split_results(inner.are_cotangents)
            joined = [a or b for a, b in zip(carry, carried, strict=True)]
            if joined == carry:
                break
            carry = joined
        self._mark(eqn, inner.are_cotangents)
        self._unknown |= set(eqn.outvars)
        is_same = inner.jaxpr is scan.jaxpr
        self._eqns.append(eqn if is_same else self._rebuild(scan, inner))

    def _liftable(self, scan: Scan) -> tuple[bool, ...]:
        """Returns which operands of a scan are quantized before it, if a matmul asks.

        They are constants, and stacks that another scan takes, too, as the weights of
        layers are. A stack that a scan computes is none: it is a residual, and its
        quantized copy would be held beside it.
        """
        if not may_change_operands(scan.eqn):
            return (False,) * len(scan.eqn.invars)
        consts, carry, xs = scan.split_operands(scan.eqn.invars)
        is_known = lambda x: (
            is_var(x)
            and self._num_scans[x] > 1
            and (self._is_constant(x) or x not in self._unknown)
        )
        return (*map(is_var, consts), *[False] * len(carry), *map(is_known, xs))

    def _rebuild(self, scan: Scan, inner: _Rewritten) -> Any:
        """Returns a scan with a rewritten body, which takes quantized operands."""
        consts, carry, xs = scan.split_operands(scan.eqn.invars)
        body = open_jaxpr(inner.jaxpr)
        inner_consts, *inner_rest = scan.split_operands(
            body.invars[: len(scan.eqn.invars)]
        )
        new_inputs = iter(body.invars[len(scan.eqn.invars) :])
        for position, dtype, num_stacked in inner.lifted:
            is_constant = position < scan.num_consts
            operands, inputs = (
                (consts, inner_consts) if is_constant else (xs, inner_rest[1])
            )
            num_axes = num_stacked if is_constant else num_stacked + 1
            x = scan.eqn.invars[position]
            operands += self._quantize(x, dtype, scan.eqn, num_axes)
            inputs += [next(new_inputs), next(new_inputs)]
        jaxpr = with_equations(
            inner.jaxpr, invars=[*inner_consts, *inner_rest[0], *inner_rest[1]]
        )
        rebuilt = scan.rebuild(
            jaxpr, num_consts=len(consts), invars=[*consts, *carry, *xs]
        )
        return _with_effects(rebuilt, jaxpr)

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
