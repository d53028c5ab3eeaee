"""The rewriting of the equations of one jaxpr, one method per kind of primitive."""

from typing import Any

import numpy as np

from mpjax._autocast import custom as _custom
from mpjax._autocast.decide import (
    Fit,
    asks_for_sign,
    fit,
    is_eligible,
    params_in_half,
)
from mpjax._autocast.demand import NOTHING, Wish
from mpjax._autocast.operands import Operands
from mpjax._jaxpr import core as _jaxpr
from mpjax._jaxpr.core import Literal, Var, dtype_of, is_float32, open_jaxpr
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.primitives import Kind, facts_of
from mpjax._xla_cpu.convolutions import plain_convolution
from mpjax._xla_cpu.matmuls import low_outputs, swaps_operands, with_unit_axes

_FLOAT32 = np.dtype(np.float32)


class Body(Operands):
    """Rewrites one jaxpr.

    Args:
      rewriter: the `Rewriter`, which knows the kinds and rules, and goes deeper.
      wishes: what the consumers of each variable want.
      scope: the name scope of the jaxpr.
      times: how often it runs.
    """

    def __init__(self, rewriter: Any, wishes: dict, scope: str, times: int):
        super().__init__()
        self._rewriter = rewriter
        self._wishes = wishes
        self._scope = scope
        self._times = times
        self._dots: dict[Var, int] = {}
        self._convolutions: list[int] = []
        self._uses: dict[Var, int] | None = None
        self._handlers = {
            Kind.HALF: self._low,
            Kind.FLOAT32: self._untouched,
            Kind.PROMOTE: self._follow,
            Kind.CALL: self._call,
            Kind.COND: self._branch,
            Kind.LOOP: self._loop,
            Kind.CUSTOM: self._custom,
            Kind.OPAQUE: self._opaque,
        }

    def run(self, jaxpr: Any, in_dtypes: Any, in_values: Any, out_dtypes: Any) -> Any:
        """Rewrites all equations.

        Args:
          jaxpr: closed or open.
          in_dtypes: actual dtype per input.
          in_values: known number per input, or None.
          out_dtypes: what each output is cast to; None for as it comes.

        Returns:
          The jaxpr (the very object if nothing changed) and its outputs' dtypes.
        """
        self._body = open_jaxpr(jaxpr)
        invars = [
            self.define(var, dtype)
            for var, dtype in zip(self._body.invars, in_dtypes, strict=True)
        ]
        for var, value in zip(self._body.invars, in_values, strict=True):
            self.set_value(var, value)
        for eqn in self._body.eqns:
            self._handlers[self._rewriter.kind_of(eqn)](eqn)
        made_by = {v: eqn for eqn in self._body.eqns for v in eqn.outvars}
        outvars = [
            self.actual(x) if dtype is None else self.returned(x, dtype, made_by)
            for x, dtype in zip(self._body.outvars, out_dtypes, strict=True)
        ]
        out_dtypes = tuple(map(dtype_of, outvars))
        if not self.changed:
            return jaxpr, out_dtypes
        forms = dict.fromkeys(self._dots.values(), with_unit_axes)
        forms |= dict.fromkeys(self._convolutions, plain_convolution)
        eqns: list[Any] = []
        for index, eqn in enumerate(self.eqns):
            if eqn is not None:
                eqns += forms[index](eqn) if index in forms else [eqn]
        changes = {"invars": invars, "outvars": outvars, "eqns": eqns}
        return _jaxpr.with_equations(jaxpr, **changes), out_dtypes

    def _write(self, eqn: Any, *, invars: Any, params: Any = None, dtypes: Any = None):
        """Writes an equation with what is new about it; the very one if nothing is."""
        changes: dict[str, Any] = {}
        pairs = zip(invars, eqn.invars, strict=True)
        if any(new is not old for new, old in pairs):
            changes["invars"] = invars
        if params is not None:
            changes["params"] = params
        if dtypes is not None:
            outs = zip(eqn.outvars, dtypes, strict=True)
            changes["outvars"] = [self.define(var, dtype) for var, dtype in outs]
        self.changed = self.changed or bool(changes)
        self.eqns.append(eqn.replace(**changes) if changes else eqn)

    def _log(self, eqn: Any, dtype: Any = None, reason: str = "") -> None:
        if self._rewriter.log is not None:
            self._rewriter.log(eqn, self._scope, self._times, dtype, reason)

    def _untouched(self, eqn: Any, reason: str = "") -> None:
        self._write(eqn, invars=[self.as_traced(x, eqn) for x in eqn.invars])
        self._log(eqn, reason=reason)

    def _opaque(self, eqn: Any) -> None:
        if asks_for_sign(eqn):
            for x in eqn.invars:
                dtype = None if isinstance(x, Literal) else self._wish(x).only_half()
                if dtype is not None:
                    self._write(eqn, invars=self._in_half(eqn, dtype))
                    return
        self._untouched(eqn)

    def _low(self, eqn: Any) -> None:
        dtype = self._rewriter.low_dtype(eqn, self._scope)
        if dtype is None:
            self._untouched(eqn, self._rewriter.why_not_low(eqn, self._scope))
            return
        params = dict(eqn.params)
        if "preferred_element_type" in params:
            params["preferred_element_type"] = dtype
        if "precision" in params:
            params["precision"] = None
        invars = self._in_half(eqn, dtype)
        outs = low_outputs(eqn.replace(invars=invars, params=params), dtype)
        self._write(eqn, invars=invars, params=params, dtypes=outs)
        if eqn.primitive.name == "dot_general":
            self._dots[eqn.outvars[0]] = len(self.eqns) - 1
        elif eqn.primitive.name == "conv_general_dilated":
            self._convolutions.append(len(self.eqns) - 1)
        self._log(eqn, dtype)

    def _in_half(self, eqn: Any, dtype: Any) -> list[Any]:
        return [
            self.cast(x, dtype, eqn) if is_float32(x.aval) else self.actual(x)
            for x in eqn.invars
        ]

    def _follow(self, eqn: Any) -> None:
        name = eqn.primitive.name
        self._follow_constant(eqn)
        eligible = is_eligible(eqn)
        narrow = self._narrow_dtype(eqn) if eligible else None
        is_full = all(self.actual(x) is x for x in eqn.invars)
        if not eligible or (is_full and narrow is None):
            self._untouched(eqn)
            return
        if name == "optimization_barrier":
            actual = [self.actual(x) for x in eqn.invars]
            self._write(eqn, invars=actual, dtypes=[dtype_of(x) for x in actual])
            return
        dtype, rounds, reason = narrow or self._follow_dtype(eqn)
        if dtype == _FLOAT32:
            self._untouched(eqn, reason)
        elif rounds:
            self._round_once(eqn, dtype)
        elif name != "transpose" or not self._swap_operands(eqn):
            params = params_in_half(eqn, dtype)
            outs = [dtype] * len(eqn.outvars)
            self._write(
                eqn, invars=self._in_half(eqn, dtype), params=params, dtypes=outs
            )
        if dtype != _FLOAT32:
            self._log(eqn, dtype)

    def _follow_constant(self, eqn: Any) -> None:
        """Notes that moving or casting a constant leaves it one, so never rounded."""
        is_cast = eqn.primitive.name == "convert_element_type"
        if len(eqn.invars) == 1 and (is_cast or facts_of(eqn).moves_data):
            for var in eqn.outvars:
                if is_float32(var.aval):
                    self.set_value(var, self.value(eqn.invars[0]))

    def _wish(self, var: Var) -> Wish:
        return self._wishes.get(var, NOTHING)

    def _narrow_dtype(self, eqn: Any) -> tuple[Any, bool, str] | None:
        """Returns in what half an op may run though its operands are float32.

        An exact one where all who consume it want half; an activation function where
        a matmul takes it, and its derivative would save it in float32 beside that.
        """
        name, facts = eqn.primitive.name, facts_of(eqn)
        if facts.is_activation:
            wish = self._wish(eqn.outvars[0])
            saved = wish.full and not wish.exact and len(wish.halves) == 1
            return (next(iter(wish.halves)), False, "") if saved else None
        if not facts.is_exact or facts.shrinks:
            return None
        dtypes = {self._wish(v).only_half() for v in eqn.outvars}
        dtype = dtypes.pop()
        constants = (self.value(x) for x in eqn.invars if is_float32(x.aval))
        if dtype is None or dtypes or name == "optimization_barrier":
            return None
        if all(v is None or fit(v, dtype) is Fit.EXACT for v in constants):
            return dtype, False, ""
        return None

    def _follow_dtype(self, eqn: Any) -> tuple[Any, bool, str]:
        """Returns the dtype of the result, whether it is rounded to that, and why."""
        floats = [x for x in eqn.invars if is_float32(x.aval)]
        numbers = {x: self.value(x) for x in floats if not isinstance(x, Literal)}
        constants = [self.value(x) for x in floats]
        actual = {dtype_of(self.actual(x)) for x, n in numbers.items() if n is None}
        if len(actual) != 1 or _FLOAT32 in actual:
            return _FLOAT32, False, "an operand is float32"
        wanted_half = any(self._wish(v).halves for v in eqn.outvars)
        if not facts_of(eqn).is_exact and not wanted_half:
            return _FLOAT32, False, "every consumer wants float32"
        dtype = actual.pop()
        fits = {v: fit(v, dtype) for v in constants if v is not None}
        for value, how in fits.items():
            if how is Fit.OUT_OF_RANGE:
                return _FLOAT32, False, f"{value:g} is out of the range of {dtype}"
        return dtype, Fit.ROUNDS in fits.values(), ""

    def _round_once(self, eqn: Any, dtype: Any) -> None:
        """Runs an equation in float32, for a constant's sake, and rounds its result."""
        full = [self.as_traced(x, eqn) for x in eqn.invars]
        outvars = [Var(var.aval) for var in eqn.outvars]
        self.eqns.append(eqn.replace(invars=full, outvars=outvars))
        for var, out in zip(eqn.outvars, outvars, strict=True):
            self.convert(out, self.define(var, dtype), eqn)

    def _swap_operands(self, eqn: Any) -> bool:
        """Makes a transposed matmul directly, by exchanging its operands.

        The gradient of `x @ w` for `w` is traced as a transpose of a matmul. XLA folds
        the two, but not with the cast to half between them: every later pass over the
        gradient then reads it against its layout.
        """
        source = eqn.invars[0]
        index = self._dots.get(source)
        if index is None or self._num_uses(source) != 1:
            return False
        dot = self.eqns[index]
        if not swaps_operands(dot, eqn.params["permutation"]):
            return False
        contract, batch = dot.params["dimension_numbers"]
        numbers = (contract[::-1], batch[::-1])
        self.eqns[index] = None
        swapped = dot.replace(
            invars=dot.invars[::-1],
            outvars=[self.define(eqn.outvars[0], dtype_of(dot.outvars[0]))],
            params=dot.params | {"dimension_numbers": numbers},
        )
        self._dots[eqn.outvars[0]] = len(self.eqns)
        self.eqns.append(swapped)
        return True

    def _num_uses(self, var: Var) -> int:
        if self._uses is None:
            self._uses = {}
            atoms = [x for eqn in self._body.eqns for x in eqn.invars]
            for atom in (*atoms, *self._body.outvars):
                if not isinstance(atom, Literal):
                    self._uses[atom] = self._uses.get(atom, 0) + 1
        return self._uses.get(var, 0)

    def _inner(self, eqn: Any, jaxpr: Any, **kwargs: Any) -> tuple[Any, Any]:
        scope = _jaxpr.join_scope(self._scope, eqn)
        times = self._times * _jaxpr.num_trips(eqn)
        return self._rewriter.rewrite(jaxpr, scope=scope, times=times, **kwargs)

    def _rewrite_params(self, eqn: Any, **kwargs: Any) -> dict[str, Any] | None:
        """Rewrites the jaxprs inside an equation; None if that changes nothing."""
        changed = False

        def rewrite(jaxpr):
            nonlocal changed
            new, _ = self._inner(eqn, jaxpr, **kwargs)
            changed = changed or new is not jaxpr
            return new

        params = _jaxpr.map_inner_jaxprs(rewrite, eqn.params)
        return params if changed else None

    def _call(self, eqn: Any) -> None:
        inner = _jaxpr.inner_jaxprs(eqn)
        if len(inner) != 1 or len(open_jaxpr(inner[0]).invars) != len(eqn.invars):
            self._untouched(eqn, "a call of unknown form")
            return
        invars = [self.actual(x) for x in eqn.invars]
        rewritten, dtypes = self._inner(
            eqn,
            inner[0],
            in_dtypes=tuple(map(dtype_of, invars)),
            in_values=tuple(map(self.value, eqn.invars)),
            out_wishes=tuple(self._wishes.get(v, NOTHING) for v in eqn.outvars),
        )
        if rewritten is inner[0]:
            self._write(eqn, invars=invars)
            return
        params = _jaxpr.map_inner_jaxprs(lambda _: rewritten, eqn.params)
        self._write(eqn, invars=invars, params=params, dtypes=dtypes)

    def _branch(self, eqn: Any) -> None:
        invars = [self.actual(x) for x in eqn.invars]
        params = self._rewrite_params(
            eqn,
            in_dtypes=tuple(map(dtype_of, invars[1:])),
            in_values=tuple(map(self.value, eqn.invars[1:])),
        )
        self._write(eqn, invars=invars, params=params)

    def _loop(self, eqn: Any) -> None:
        if eqn.primitive.name == "scan":
            self._scan(eqn)
            return
        invars = [self.as_traced(x, eqn) for x in eqn.invars]
        self._write(eqn, invars=invars, params=self._rewrite_params(eqn))

    def _scan(self, eqn: Any) -> None:
        """Constants and what is carried stay as traced; what is stacked may be half."""
        scan = Scan(eqn)
        consts, carry, xs = scan.split_operands(eqn.invars)
        invars = [self.as_traced(x, eqn) for x in (*consts, *carry)]
        invars += map(self.actual, xs)
        carried, ys = scan.split_results(eqn.outvars)
        rewritten, dtypes = self._inner(
            eqn,
            scan.jaxpr,
            in_dtypes=tuple(map(dtype_of, invars)),
            out_dtypes=(
                *map(dtype_of, carried),
                *(self._wish(v).only_half() for v in ys),
            ),
        )
        if rewritten is scan.jaxpr:
            self._write(eqn, invars=invars)
            return
        params = eqn.params | {"jaxpr": rewritten}
        self._write(eqn, invars=invars, params=params, dtypes=dtypes)

    def _custom(self, eqn: Any) -> None:
        rewriter = self._rewriter
        if rewriter.demand.is_elementwise(eqn):
            self._elementwise(eqn)
            return
        traced = rewriter.custom(eqn, self._scope)
        if traced is None:
            self._loop(eqn)
            return
        if rewriter.log is not None:
            self._rewrite_params(eqn)  # only for what it logs
        self.splice(traced, eqn, [self.as_traced(x, eqn) for x in eqn.invars])

    def _elementwise(self, eqn: Any) -> None:
        """A `custom_jvp` function such as relu: in half where its result is."""
        invars = [self.actual(x) for x in eqn.invars]
        rewritten, dtypes = self._rewriter.silent().rewrite(
            _jaxpr.inner_jaxprs(eqn)[0],
            in_dtypes=tuple(map(dtype_of, invars)),
            in_values=tuple(map(self.value, eqn.invars)),
            out_wishes=tuple(map(self._wish, eqn.outvars)),
        )
        traced = None
        if dtypes != tuple(map(dtype_of, eqn.outvars)):
            avals = [x.aval for x in invars]
            traced = _custom.trace_elementwise(eqn, rewritten, avals, dtypes)
        if traced is None:
            self._untouched(eqn)
            return
        outs = zip(eqn.outvars, dtypes, strict=True)
        self.splice(traced, eqn, invars, [self.define(v, d) for v, d in outs])
        self._log(eqn, dtypes[0])
