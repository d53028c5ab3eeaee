"""Gradients in float32 from the operation on that adds them up.

The gradient of a parameter is a sum over the batch: a matmul, a convolution or
a `reduce_sum`. Where devices share the batch, XLA adds up their parts of the sum at
once, in the dtype of the operation's result. In half precision every part is rounded
before it is added, and parts that nearly cancel lose most of their bits. So what goes
nowhere but to a gradient becomes float32; what a matmul takes stays half.

It is a pass of its own, not a decision of autocast, since it also holds without
autocast, and for what the user writes in half.
"""

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from mpjax._autocast.float8_equations import MadeFloat8Call, with_float32_result
from mpjax._jaxpr.core import (
    Literal,
    convert_eqn,
    inner_jaxprs,
    is_float32,
    is_var,
    literal,
    map_inner_jaxprs,
    new_var,
    open_jaxpr,
    with_equations,
)
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.primitives import Kind, facts_of
from mpjax._train.convolutions import add_parts_in_float32
from mpjax._tree import is_half
from mpjax._xla_cpu import switch
from mpjax._xla_cpu.matmuls import in_float32_on_cpu

_FLOAT32 = np.dtype(np.float32)


def widen_gradients(jaxpr: Any, num_gradients: int, mesh: Any) -> Any:
    """Returns a jaxpr that computes gradients in float32 from their sums on.

    Args:
      jaxpr: closed or open.
      num_gradients: how many outputs, the first ones, are gradients of parameters.
      mesh: the devices that XLA splits the batch over; None inside `shard_map`.

    Returns:
      The jaxpr, with outputs of the same dtypes; the same object if nothing changed.
    """
    body = open_jaxpr(jaxpr)
    outputs = tuple(
        _Use(is_gradient=index < num_gradients, is_as_traced=True)
        for index in range(len(body.outvars))
    )
    return _Widening(mesh).rewrite(jaxpr, outputs, (False,) * len(body.invars))


class _Use(NamedTuple):
    """What takes a value.

    Attributes:
      is_gradient: whether it goes to a gradient by arithmetic, through no further sum.
      is_as_traced: whether something takes it in the dtype that it was traced in.
    """

    is_gradient: bool = False
    is_as_traced: bool = False

    def widens(self, atom: Any) -> bool:
        """Whether a value that was traced in half is float32."""
        return self.is_gradient and not self.is_as_traced and is_half(atom.aval)


_NO_USE = _Use()
_AS_TRACED = _Use(is_as_traced=True)


class _Widening:
    """Finds how values are used, and rewrites them, once per jaxpr and its uses."""

    def __init__(self, mesh: Any):
        self.mesh = mesh
        self._uses: dict[Any, tuple[Any, dict]] = {}
        self._done: dict[Any, tuple[Any, Any]] = {}

    def rewrite(
        self, jaxpr: Any, outputs: tuple[_Use, ...], is_wide: tuple[bool, ...]
    ) -> Any:
        """Returns a jaxpr with float32 for what its uses widen.

        Args:
          jaxpr: closed or open.
          outputs: the use of each output.
          is_wide: whether each input, traced in half, is float32.
        """
        key = (id(jaxpr), outputs, is_wide)
        if key not in self._done:
            rewriter = _JaxprWidening(self, self.uses(jaxpr, outputs))
            self._done[key] = (jaxpr, rewriter.run(jaxpr, outputs, is_wide))
        return self._done[key][1]

    def uses(self, jaxpr: Any, outputs: tuple[_Use, ...]) -> dict:
        """Returns the use of each variable, found from the last equation on."""
        key = (id(jaxpr), outputs)
        if key not in self._uses:
            found: dict = {}
            body = open_jaxpr(jaxpr)
            _add(found, body.outvars, outputs)
            for eqn in reversed(body.eqns):
                results = [found.get(v, _NO_USE) for v in eqn.outvars]
                _add(found, eqn.invars, self._operand_uses(eqn, results))
            self._uses[key] = (jaxpr, found)
        return self._uses[key][1]

    def _operand_uses(self, eqn: Any, results: list[_Use]) -> list[_Use]:
        if eqn.primitive.name == "scan":
            return self._scan_uses(eqn, results)
        if _is_entered(eqn):
            uses = [self._input_uses(x, tuple(results)) for x in inner_jaxprs(eqn)]
            joined = [_join(each) for each in zip(*uses, strict=True)]
            return [_AS_TRACED] * _num_indices(eqn) + joined
        use = _join(results)
        if _is_cast(eqn) and is_float32(eqn.outvars[0].aval):
            return [_Use(is_gradient=use.is_gradient)]
        takes_float32 = use.is_gradient and _passes_on(eqn)
        return [use if takes_float32 else _AS_TRACED] * len(eqn.invars)

    def _input_uses(self, jaxpr: Any, outputs: tuple[_Use, ...]) -> list[_Use]:
        found = self.uses(jaxpr, outputs)
        return [found.get(v, _NO_USE) for v in open_jaxpr(jaxpr).invars]

    def _scan_uses(self, eqn: Any, results: list[_Use]) -> list[_Use]:
        """Returns the uses of a scan's operands; constants and xs go in as traced."""
        scan = Scan(eqn)
        uses = self._input_uses(scan.jaxpr, self.body_outputs(scan, results))
        consts, carry, xs = scan.split_operands(uses)
        keep = lambda uses: [use._replace(is_as_traced=True) for use in uses]
        return [*keep(consts), *carry, *keep(xs)]

    def body_outputs(self, scan: Scan, results: list[_Use]) -> tuple[_Use, ...]:
        """Returns the uses of the outputs of a scan's body.

        What a step carries is used by the next step, and in the end after the loop.
        """
        carried, ys = scan.split_results(results)
        while True:
            outputs = (*carried, *ys)
            uses = self._input_uses(scan.jaxpr, outputs)
            _, carry, _ = scan.split_operands(uses)
            joined = [_join(pair) for pair in zip(carried, carry, strict=True)]
            if joined == carried:
                return outputs
            carried = joined


class _JaxprWidening:
    """Rewrites one jaxpr.

    Args:
      widening: rewrites the jaxprs inside.
      uses: the use of each variable.
    """

    def __init__(self, widening: _Widening, uses: dict):
        self._widening = widening
        self._uses = uses
        self._new: dict[Any, Any] = {}
        self._eqns: list[Any] = []

    def run(
        self, jaxpr: Any, outputs: tuple[_Use, ...], is_wide: tuple[bool, ...]
    ) -> Any:
        """Returns the rewritten jaxpr; the same object if nothing changed."""
        body = open_jaxpr(jaxpr)
        for var, wide in zip(body.invars, is_wide, strict=True):
            if wide:
                self._new[var] = new_var(var.aval, _FLOAT32)
        for eqn in body.eqns:
            self._rewrite(eqn)
        outvars = [
            self._full(x) if use.widens(x) else self._actual(x)
            for x, use in zip(body.outvars, outputs, strict=True)
        ]
        old, new = [*body.eqns, *body.outvars], [*self._eqns, *outvars]
        is_same = len(new) == len(old) and all(map(operator.is_, new, old))
        if is_same and not self._new:
            return jaxpr
        invars = list(map(self._actual, body.invars))
        return with_equations(jaxpr, invars=invars, outvars=outvars, eqns=self._eqns)

    def _rewrite(self, eqn: Any) -> None:
        uses = list(map(self._use, eqn.outvars))
        is_wide = all(map(_Use.widens, uses, eqn.outvars))
        if eqn.primitive.name == "scan":
            self._scan(eqn)
        elif _is_entered(eqn):
            self._enter(eqn)
        elif _is_cast(eqn) and self._is_needless(eqn):
            self._new[eqn.outvars[0]] = self._actual(eqn.invars[0])
        elif is_wide and isinstance(eqn.params, MadeFloat8Call):
            out = self._new[eqn.outvars[0]] = new_var(eqn.outvars[0].aval, _FLOAT32)
            self._eqns.append(with_float32_result(eqn, out))
        elif is_wide and _may_return_float32(eqn):
            self._matmul(eqn)
        elif is_wide and (_passes_on(eqn) or facts_of(eqn).adds_up):
            invars = [self._full(x, eqn) for x in eqn.invars]
            self._write(eqn, invars=invars, params=_params_in_float32(eqn), uses=uses)
        else:
            invars = list(map(self._actual, eqn.invars))
            as_traced = [_AS_TRACED] * len(uses)
            self._write(eqn, invars=invars, params=eqn.params, uses=as_traced)

    def _is_needless(self, cast: Any) -> bool:
        """Whether its operand is float32, and its result is to be, too."""
        (x,), (out,) = cast.invars, cast.outvars
        is_wide = self._is_wide(x) and is_float32(out.aval)
        return is_wide or (
            self._use(out).widens(out) and is_float32(self._actual(x).aval)
        )

    def _matmul(self, eqn: Any) -> None:
        """Writes a matmul or convolution of half operands with a float32 result."""
        (old,) = eqn.outvars
        out = self._new[old] = new_var(old.aval, _FLOAT32)
        if eqn.primitive.name == "conv_general_dilated":
            self._eqns += add_parts_in_float32(eqn, out, self._widening.mesh)
            return
        params = eqn.params | {"preferred_element_type": _FLOAT32}
        wide = eqn.replace(outvars=[out], params=params)
        self._eqns += in_float32_on_cpu(wide) if switch.is_on else [wide]

    def _enter(self, eqn: Any) -> None:
        """Rewrites a call or a conditional."""
        outputs = tuple(map(self._use, eqn.outvars))
        is_wide = tuple(map(self._is_wide, eqn.invars[_num_indices(eqn) :]))
        self._write(
            eqn,
            invars=list(map(self._actual, eqn.invars)),
            params=map_inner_jaxprs(
                lambda x: self._widening.rewrite(x, outputs, is_wide), eqn.params
            ),
            uses=outputs,
        )

    def _scan(self, eqn: Any) -> None:
        scan = Scan(eqn)
        outputs = self._widening.body_outputs(scan, list(map(self._use, eqn.outvars)))
        consts, carry, xs = scan.split_operands(eqn.invars)
        carried = zip(outputs, carry, strict=False)
        is_wide = (
            *[False] * len(consts),
            *[use.widens(x) for use, x in carried],
            *[False] * len(xs),
        )
        self._write(
            eqn,
            invars=[
                self._full(x, eqn) if wide else self._actual(x)
                for x, wide in zip(eqn.invars, is_wide, strict=True)
            ],
            params=eqn.params
            | {"jaxpr": self._widening.rewrite(scan.jaxpr, outputs, is_wide)},
            uses=outputs,
        )

    def _use(self, var: Any) -> _Use:
        return self._uses.get(var, _NO_USE)

    def _is_wide(self, atom: Any) -> bool:
        return is_half(atom.aval) and is_float32(self._actual(atom).aval)

    def _actual(self, atom: Any) -> Any:
        return self._new.get(atom, atom) if is_var(atom) else atom

    def _full(self, atom: Any, like: Any = None) -> Any:
        """Returns an atom in float32 if it is half; any other as it is."""
        actual = self._actual(atom)
        if not is_half(actual.aval):
            return actual
        if isinstance(actual, Literal):
            return literal(actual.val, _FLOAT32)
        out = new_var(actual.aval, _FLOAT32)
        self._eqns.append(convert_eqn(actual, out, like))
        return out

    def _write(self, eqn: Any, *, invars: Any, params: Any, uses: Any) -> None:
        """Writes an equation; a result that it leaves in half is cast after it.

        Args:
          eqn: the equation.
          invars: its operands.
          params: its parameters.
          uses: one per result; those that widen a result make it float32.
        """
        outvars = [
            new_var(v.aval, _FLOAT32) if use.widens(v) else v
            for v, use in zip(eqn.outvars, uses, strict=True)
        ]
        new = eqn.replace(invars=invars, outvars=outvars, params=params)
        is_same = all(
            map(
                operator.is_,
                [*invars, *outvars, *inner_jaxprs(new)],
                [*eqn.invars, *eqn.outvars, *inner_jaxprs(eqn)],
            )
        )
        self._eqns.append(eqn if is_same else new)
        for old, out in zip(eqn.outvars, outvars, strict=True):
            if out is not old:
                self._new[old] = out
            elif self._use(old).widens(old):
                self._new[old] = self._full(old, eqn)


def _num_indices(eqn: Any) -> int:
    """Returns how many operands come before those of the jaxprs inside."""
    return 1 if eqn.primitive.name == "cond" else 0


def _is_entered(eqn: Any) -> bool:
    """Whether it is a call or a conditional whose jaxprs take its operands."""
    num = len(eqn.invars) - _num_indices(eqn)
    inner = inner_jaxprs(eqn)
    is_call = facts_of(eqn).kind in (Kind.CALL, Kind.COND)
    return is_call and all(len(open_jaxpr(x).invars) == num for x in inner)


def _is_cast(eqn: Any) -> bool:
    return eqn.primitive.name == "convert_element_type"


def _passes_on(eqn: Any) -> bool:
    """Whether it moves, chooses or combines numbers one by one, or over devices."""
    name, facts = eqn.primitive.name, facts_of(eqn)
    if name == "reduce_sum":  # A sum over axes of length 1 adds nothing.
        return eqn.invars[0].aval.size == eqn.outvars[0].aval.size
    is_as_written = name == "optimization_barrier" or name == "reduce_precision"
    is_arithmetic = facts.kind is Kind.PROMOTE and not is_as_written
    return is_arithmetic or facts.adds_devices


def _may_return_float32(eqn: Any) -> bool:
    """Whether it is a matmul or convolution that names no algorithm."""
    algorithms = (jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset)
    names_one = isinstance(eqn.params.get("precision"), algorithms)
    return facts_of(eqn).is_matmul and not names_one


def _params_in_float32(eqn: Any) -> Any:
    """Returns the parameters of an equation for float32 operands and results."""
    if _is_cast(eqn):
        return eqn.params | {"new_dtype": _FLOAT32}
    if eqn.primitive.name != "scatter-add":
        return eqn.params
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    params = {name: eqn.params[name] for name in names}
    operand, indices, updates = (x.aval for x in eqn.invars)
    scatter = jax.make_jaxpr(lambda *args: jax.lax.scatter_add(*args, **params))
    (new,) = scatter(
        jax.ShapeDtypeStruct(operand.shape, _FLOAT32),
        jax.ShapeDtypeStruct(indices.shape, indices.dtype),
        jax.ShapeDtypeStruct(updates.shape, _FLOAT32),
    ).eqns
    return new.params


def _join(uses: Iterable[_Use]) -> _Use:
    uses = list(uses)
    return _Use(
        any(use.is_gradient for use in uses), any(use.is_as_traced for use in uses)
    )


def _add(found: dict, atoms: Any, uses: Any) -> None:
    for atom, use in zip(atoms, uses, strict=True):
        if is_var(atom):
            found[atom] = _join((found.get(atom, _NO_USE), use))
