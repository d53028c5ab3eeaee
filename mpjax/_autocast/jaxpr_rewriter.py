"""Rewrites the equations of one jaxpr, with one method per kind of primitive."""

from typing import Any, NamedTuple

import jax
import numpy as np

from mpjax._autocast import custom
from mpjax._autocast.demand import NO_DEMAND, Demand
from mpjax._autocast.eligibility import (
    Rounding,
    asks_for_sign,
    classify_rounding,
    derivative_is_sum,
    is_eligible,
    params_in_half,
)
from mpjax._autocast.environment import Environment
from mpjax._autocast.float8 import why_not_float8
from mpjax._autocast.sums import Sums
from mpjax._jaxpr.core import (
    Literal,
    MadeFloat8,
    MadeHalf,
    Var,
    bind,
    dtype_of,
    inner_jaxprs,
    is_float32,
    map_inner_jaxprs,
    num_trips,
    open_jaxpr,
    with_equations,
)
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.primitives import Kind, facts_of
from mpjax._jaxpr.provenance import is_backward, join_scope

_FLOAT32 = np.dtype(np.float32)


class _Decision(NamedTuple):
    """The dtype in which an operation that follows its operands runs.

    Attributes:
      dtype: the dtype of its result.
      is_rounded: whether it runs in float32 and its result is rounded to `dtype` once.
      reason: why the result is float32; empty if it is not.
    """

    dtype: Any
    is_rounded: bool = False
    reason: str = ""


class JaxprRewriter:
    """Rewrites one jaxpr.

    Args:
      rewriter: the `Rewriter`, which has the kinds and rules, and rewrites inner
        jaxprs.
      demands: the demand on each variable.
      scope: the name scope of the jaxpr.
      times: how often it runs.
      in_backward: whether it belongs to a backward pass.
    """

    def __init__(
        self,
        rewriter: Any,
        demands: dict,
        scope: str,
        times: int,
        in_backward: bool = False,
    ):
        self._rewriter = rewriter
        self._demands = demands
        self._scope = scope
        self._times = times
        self._in_backward = in_backward
        self._env = Environment()
        self._handlers = {
            Kind.HALF: self._half,
            Kind.FLOAT32: self._as_traced,
            Kind.PROMOTE: self._promote,
            Kind.CALL: self._call,
            Kind.CALL_AS_TRACED: self._inside,
            Kind.COND: self._cond,
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
          out_dtypes: the dtype that each output is cast to; None to keep its own.

        Returns:
          The jaxpr (the same object if nothing changed) and its outputs' dtypes.
        """
        env, body = self._env, open_jaxpr(jaxpr)
        ins = zip(body.invars, in_dtypes, strict=True)
        invars = [env.define(var, dtype) for var, dtype in ins]
        for var, value in zip(body.invars, in_values, strict=True):
            env.set_known_value(var, value)
        kind_of = self._rewriter.kind_of
        self._sums = Sums(body, env, kind_of, self._in_backward)
        for eqn in body.eqns:
            self._handlers[kind_of(eqn)](eqn)
        producers = {v: eqn for eqn in body.eqns for v in eqn.outvars}
        outs = zip(body.outvars, out_dtypes, strict=True)
        outvars = [env.output(x, dtype, producers) for x, dtype in outs]
        out_dtypes = tuple(map(dtype_of, outvars))
        if not env.changed:
            return jaxpr, out_dtypes
        rewritten = with_equations(jaxpr, invars=invars, outvars=outvars, eqns=env.eqns)
        return rewritten, out_dtypes

    def _demand(self, var: Var) -> Demand:
        return self._demands.get(var, NO_DEMAND)

    def _log(self, eqn: Any, dtype: Any = None, reason: str = "") -> None:
        if self._rewriter.log is not None:
            self._rewriter.log(eqn, self._scope, self._times, dtype, reason)

    def _as_traced(self, eqn: Any, reason: str = "") -> None:
        env = self._env
        env.write(eqn, invars=[env.as_traced(x, eqn) for x in eqn.invars])
        self._log(eqn, reason=reason)

    def _opaque(self, eqn: Any) -> None:
        if asks_for_sign(eqn):
            for x in eqn.invars:
                dtype = None if isinstance(x, Literal) else self._demand(x).only_half()
                if dtype is not None:
                    self._env.write(eqn, invars=self._operands_in(eqn, dtype))
                    return
        self._as_traced(eqn)

    # Matmuls.

    def _half(self, eqn: Any) -> None:
        dtype = self._rewriter.half_dtype(eqn, self._scope)
        if dtype is None:
            self._as_traced(eqn, self._rewriter.why_not_half(eqn, self._scope))
            return
        reason, params = "", MadeHalf(eqn.params)
        policy = self._rewriter.float8_policy(eqn, self._scope)
        if policy is not None:
            reason = why_not_float8(eqn, all_sizes=policy.all_sizes)
            if not reason:
                params = MadeFloat8(eqn.params, all_sizes=policy.all_sizes)
        if "preferred_element_type" in params:
            params["preferred_element_type"] = dtype
        if "precision" in params:
            params["precision"] = None
        invars = self._operands_in(eqn, dtype)
        outs = _output_dtypes(eqn.replace(invars=invars, params=params), dtype)
        self._env.write(eqn, invars=invars, params=params, dtypes=outs)
        is_float8 = isinstance(params, MadeFloat8)
        self._log(eqn, "float8" if is_float8 else dtype, reason)

    def _operands_in(self, eqn: Any, dtype: Any) -> list[Any]:
        env = self._env
        if facts_of(eqn).is_sum:
            shape = eqn.outvars[0].aval.shape
            return [env.cast_broadcast(x, shape, dtype, eqn) for x in eqn.invars]
        return [
            env.cast(x, dtype, eqn) if is_float32(x.aval) else env.actual(x)
            for x in eqn.invars
        ]

    # Operations that follow their operands.

    def _promote(self, eqn: Any) -> None:
        env = self._env
        self._keep_constant(eqn)
        eligible = is_eligible(eqn)
        narrow = self._narrow_dtype(eqn) if eligible else None
        is_full = all(env.actual(x) is x for x in eqn.invars)
        is_rounded = False
        if eligible and narrow is None:
            narrow = self._sums.half_dtype(eqn, self._demand(eqn.outvars[0]))
            is_rounded = is_full and self._sums.is_rounded_after(eqn)
        if not eligible or (is_full and narrow is None):
            self._as_traced(eqn)
            return
        if eqn.primitive.name == "optimization_barrier":
            actual = [env.actual(x) for x in eqn.invars]
            env.write(eqn, invars=actual, dtypes=[dtype_of(x) for x in actual])
            return
        if narrow is None:
            decision = self._decide(eqn)
        else:
            decision = _Decision(narrow, is_rounded=is_rounded)
        dtype = decision.dtype
        if dtype == _FLOAT32:
            self._as_traced(eqn, decision.reason)
            return
        if decision.is_rounded:
            env.write_rounded(eqn, dtype)
        else:
            is_sum = facts_of(eqn).is_sum
            env.write(
                eqn,
                invars=self._operands_in(eqn, dtype),
                params=MadeHalf(eqn.params) if is_sum else params_in_half(eqn, dtype),
                dtypes=[dtype] * len(eqn.outvars),
            )
        self._log(eqn, dtype)

    def _keep_constant(self, eqn: Any) -> None:
        """Records that a constant, reshaped or cast, is still never to be rounded."""
        out = eqn.outvars[0]
        if facts_of(eqn).keeps_constant and is_float32(out.aval):
            self._env.set_known_value(out, self._env.known_value(eqn.invars[0]))

    def _narrow_dtype(self, eqn: Any) -> Any:
        """Returns the half dtype in which an op runs despite float32 operands, or None.

        An exact op runs in half where all its consumers want half. An activation
        function runs in half where a matmul takes its result, which its derivative
        would otherwise save in float32 as well.
        """
        facts = facts_of(eqn)
        if facts.is_activation:
            demand = self._demand(eqn.outvars[0])
            is_saved = demand.wants_float32 and not demand.must_keep
            is_one = len(demand.halves) == 1
            return next(iter(demand.halves)) if is_saved and is_one else None
        is_barrier = eqn.primitive.name == "optimization_barrier"
        is_kept = facts.shrinks or derivative_is_sum(eqn) or is_barrier
        if not facts.is_exact or is_kept:
            return None
        dtypes = {self._demand(v).only_half() for v in eqn.outvars}
        dtype = dtypes.pop()
        if dtype is None or dtypes:
            return None
        constants = (self._env.known_value(x) for x in eqn.invars if is_float32(x.aval))
        is_exact = all(
            v is None or classify_rounding(v, dtype) is Rounding.EXACT
            for v in constants
        )
        return dtype if is_exact else None

    def _decide(self, eqn: Any) -> _Decision:
        """Returns the dtype of a result from the dtypes of the operands."""
        env = self._env
        floats = [x for x in eqn.invars if is_float32(x.aval)]
        variables = [x for x in floats if not isinstance(x, Literal)]
        actual = {
            dtype_of(env.actual(x)) for x in variables if env.known_value(x) is None
        }
        if len(actual) != 1 or _FLOAT32 in actual:
            return _Decision(_FLOAT32, reason="an operand is float32")
        wanted_half = any(self._demand(v).flows for v in eqn.outvars)
        if not facts_of(eqn).is_exact and not wanted_half:
            return _Decision(_FLOAT32, reason="every consumer wants float32")
        dtype = actual.pop()
        constants = [v for v in map(env.known_value, floats) if v is not None]
        roundings = {v: classify_rounding(v, dtype) for v in constants}
        for value, rounding in roundings.items():
            if rounding is Rounding.OUT_OF_RANGE:
                reason = f"{value:g} is out of the range of {dtype}"
                return _Decision(_FLOAT32, reason=reason)
        return _Decision(dtype, is_rounded=Rounding.ROUNDS in roundings.values())

    # Functions inside functions.

    def _inner(self, eqn: Any, jaxpr: Any, **kwargs: Any) -> tuple[Any, Any]:
        scope = join_scope(self._scope, eqn)
        return self._rewriter.rewrite_inner(
            jaxpr,
            scope=scope,
            times=self._times * num_trips(eqn),
            in_backward=is_backward(eqn, self._in_backward),
            **kwargs,
        )

    def _rewrite_params(self, eqn: Any, **kwargs: Any) -> dict[str, Any] | None:
        """Rewrites the jaxprs inside an equation; None if that changes nothing."""
        changed = False

        def rewrite(jaxpr):
            nonlocal changed
            new, _ = self._inner(eqn, jaxpr, **kwargs)
            changed = changed or new is not jaxpr
            return new

        params = map_inner_jaxprs(rewrite, eqn.params)
        return params if changed else None

    def _call(self, eqn: Any) -> None:
        env, inner = self._env, inner_jaxprs(eqn)
        if len(inner) != 1 or len(open_jaxpr(inner[0]).invars) != len(eqn.invars):
            self._as_traced(eqn, "a call of unknown form")
            return
        invars = [env.actual(x) for x in eqn.invars]
        rewritten, dtypes = self._inner(
            eqn,
            inner[0],
            in_dtypes=tuple(map(dtype_of, invars)),
            in_values=tuple(map(env.known_value, eqn.invars)),
            out_demands=tuple(map(self._demand, eqn.outvars)),
        )
        if rewritten is inner[0]:
            env.write(eqn, invars=invars)
            return
        params = map_inner_jaxprs(lambda _: rewritten, eqn.params)
        env.write(eqn, invars=invars, params=params, dtypes=dtypes)

    def _cond(self, eqn: Any) -> None:
        env = self._env
        invars = [env.actual(x) for x in eqn.invars]
        params = self._rewrite_params(
            eqn,
            in_dtypes=tuple(map(dtype_of, invars[1:])),
            in_values=tuple(map(env.known_value, eqn.invars[1:])),
        )
        env.write(eqn, invars=invars, params=params)

    def _loop(self, eqn: Any) -> None:
        if eqn.primitive.name == "scan":
            self._scan(eqn)
        else:
            self._inside(eqn)

    def _inside(self, eqn: Any) -> None:
        """Rewrites what is inside; inputs and outputs stay as traced."""
        invars = [self._env.as_traced(x, eqn) for x in eqn.invars]
        self._env.write(eqn, invars=invars, params=self._rewrite_params(eqn))

    def _scan(self, eqn: Any) -> None:
        """Rewrites a scan: constants and carry stay as traced, stacks may be half."""
        env, scan = self._env, Scan(eqn)
        consts, carry, xs = scan.split_operands(eqn.invars)
        invars = [env.as_traced(x, eqn) for x in (*consts, *carry)]
        invars += map(env.actual, xs)
        carried, ys = scan.split_results(eqn.outvars)
        rewritten, dtypes = self._inner(
            eqn,
            scan.jaxpr,
            in_dtypes=tuple(map(dtype_of, invars)),
            out_dtypes=(
                *map(dtype_of, carried),
                *(self._demand(v).only_half() for v in ys),
            ),
        )
        if rewritten is scan.jaxpr:
            env.write(eqn, invars=invars)
            return
        params = eqn.params | {"jaxpr": rewritten}
        env.write(eqn, invars=invars, params=params, dtypes=dtypes)

    # Functions with custom derivatives.

    def _custom(self, eqn: Any) -> None:
        rewriter = self._rewriter
        if rewriter.demand.is_elementwise(eqn):
            self._elementwise(eqn)
            return
        traced = rewriter.trace_custom(eqn, self._scope)
        if traced is None:
            self._inside(eqn)
            return
        if rewriter.log is not None:
            self._rewrite_params(eqn)  # only to log what is inside
        env = self._env
        env.splice(traced, eqn, [env.as_traced(x, eqn) for x in eqn.invars])

    def _elementwise(self, eqn: Any) -> None:
        """Rewrites a `custom_jvp` function such as relu, in half if its result is."""
        env = self._env
        invars = [env.actual(x) for x in eqn.invars]
        rewritten, dtypes = self._rewriter.silent().rewrite_inner(
            inner_jaxprs(eqn)[0],
            in_dtypes=tuple(map(dtype_of, invars)),
            in_values=tuple(map(env.known_value, eqn.invars)),
            out_demands=tuple(map(self._demand, eqn.outvars)),
        )
        traced = None
        if dtypes != tuple(map(dtype_of, eqn.outvars)):
            avals = [x.aval for x in invars]
            traced = custom.trace_elementwise(eqn, rewritten, avals, dtypes)
        if traced is None:
            self._as_traced(eqn)
            return
        outs = zip(eqn.outvars, dtypes, strict=True)
        env.splice(traced, eqn, invars, [env.define(v, d) for v, d in outs])
        self._log(eqn, dtypes[0])


def _output_dtypes(eqn: Any, dtype: Any) -> list[Any]:
    """Returns the output dtypes of a matmul, or of a primitive of the user's."""
    if facts_of(eqn).is_matmul:
        return [dtype]
    operands = [jax.ShapeDtypeStruct(x.aval.shape, dtype_of(x)) for x in eqn.invars]
    outputs = jax.eval_shape(lambda *xs: bind(eqn, *xs), *operands)
    return [x.dtype for x in outputs]
