"""The rules by which a precision report finds fault with a function."""

import dataclasses
from typing import Any

import numpy as np

from mpjax._jaxpr.core import dtype_of, is_inexact_aval, open_jaxpr
from mpjax._jaxpr.flops import count_flops
from mpjax._jaxpr.primitives import facts_of
from mpjax._report import short_source
from mpjax._tree import is_half
from mpjax.numerics._accumulation import accumulated, accumulates_in_half, num_terms
from mpjax.numerics._eqn_context import EqnContext
from mpjax.numerics._findings import (
    CANCELLATION,
    DECISION,
    FLOAT32_MATMUL,
    FLOAT64,
    HALF_ACCUMULATION,
    HALF_FUNCTION,
    LEAK,
    ROUND_TRIP,
    Finding,
    accumulation_remedy,
    place,
    rounding_message,
    stall_message,
)
from mpjax.numerics._flow import AbstractValue, Flow, Site, site_of
from mpjax.numerics._half_results import (
    Decision,
    History,
    cancelled,
    decided,
    follow,
)

# Functions of JAX by which users cast.
_CASTS = ("astype", "convert_element_type", "asarray", "array")
_WIDE = frozenset((np.dtype(np.float64), np.dtype(np.complex128)))
# Sums of no more terms than this lose no more than other operations do.
_FEW_TERMS = 8
_MATMUL_REMEDY = (
    "Cast the float32 operand to half before the matmul (or where it is computed, if "
    "other matmuls read it); accumulation is in float32 all the same."
)


def find(jaxpr: Any) -> tuple[list[Finding], list[AbstractValue]]:
    """Returns the findings in a jaxpr, and the abstract values of its outputs."""
    lint = _Lint(jaxpr)
    inputs = [
        AbstractValue(
            is_constant=not is_inexact_aval(v.aval),
            is_float64=_is_float64(v),
            history=History(origin=("argument", index)),
        )
        for index, v in enumerate(open_jaxpr(jaxpr).invars)
    ]
    outputs = lint.flow.run(jaxpr, inputs, EqnContext())
    lint.check_outputs(outputs)
    escaped = lint.escaped_leaks | {v.leak for v in outputs}
    return [x for x in lint.found if x.kind != LEAK or x.source in escaped], outputs


class _Lint:
    """The rules.

    Attributes:
      found: all findings, and every leak.
      escaped_leaks: source lines of the leaks that reach a matmul, or more values in
        half. These, and the leaks that reach an output, are findings; a leak that is
        cast back is not.
    """

    def __init__(self, jaxpr: Any):
        self.found: list[Finding] = []
        self.escaped_leaks: set[str] = set()
        self.flow = Flow(self._rule, self._check_carry)
        self._wants_float64 = any(map(_is_float64, open_jaxpr(jaxpr).invars))

    def _add(
        self,
        kind: str,
        eqn: Any,
        context: EqnContext,
        message: str,
        remedy: str,
        *,
        site: Site | None = None,
        dtype: Any = None,
        flops: int = 0,
    ) -> None:
        if self.flow.is_muted:
            return
        site = site or site_of(eqn, context)
        self.found.append(
            Finding(
                kind,
                site.primitive,
                str(dtype or dtype_of(eqn.outvars[0])),
                site.scope,
                site.source,
                message,
                remedy,
                num_calls=context.times,
                flops=flops * context.times,
            )
        )

    def _rule(
        self, eqn: Any, values: list[AbstractValue], context: EqnContext
    ) -> AbstractValue:
        is_in_half = any(is_half(x.aval) for x in (*eqn.invars, *eqn.outvars))
        out = AbstractValue(
            is_constant=all(v.is_constant for v in values) and not is_in_half,
            site=site_of(eqn, context),
            # A product with a cotangent does not pass the leak on.
            leak="" if context.is_backward else _leak(values),
            depends_on=frozenset().union(*(v.depends_on for v in values)),
            history=self._follow(eqn, values, context),
        )
        if not eqn.outvars or not is_inexact_aval(eqn.outvars[0].aval):
            return dataclasses.replace(out, leak="")
        if eqn.primitive.name == "convert_element_type":
            out = self._check_cast(eqn, values[0], context, out)
        elif facts_of(eqn).moves_data and values:
            first = values[0]
            # Each result of a split has uses of its own.
            once = first.is_used_once and len(eqn.outvars) == 1
            out = dataclasses.replace(
                first,
                is_constant=out.is_constant,
                is_used_once=once,
                history=out.history,
            )
        else:
            out = self._check_operands(eqn, values, context, out)
            out = dataclasses.replace(out, accumulated=accumulated(eqn, values, out))
        self._check_half(eqn, context)
        if dtype_of(eqn.outvars[0]) != np.float32:
            out = dataclasses.replace(out, leak="")
        return self._check_float64(eqn, values, context, out)

    # What half matmuls have rounded.

    def _follow(
        self, eqn: Any, values: list[AbstractValue], context: EqnContext
    ) -> History:
        histories = [v.history for v in values]
        product = cancelled(eqn, histories)
        if product is not None:
            self._add(
                CANCELLATION,
                eqn,
                context,
                "sums of squares, less the product of the same numbers by "
                f"{place(product.matmul)}, whose half results are rounded: of two "
                "numbers that are close, little else is left",
                "Subtract first, ((a[:, None] - b) ** 2).sum(-1), or keep the function "
                "in float32: mpjax.full_precision(fn).",
            )
        decision = decided(eqn, histories, [v.is_constant for v in values])
        if decision is not None:
            self._add_decision(decision)
            histories = [dataclasses.replace(h, decision=None) for h in histories]
        return follow(eqn, histories, site_of(eqn, context), context.times)

    def check_outputs(self, outputs: list[AbstractValue]) -> None:
        """Adds the decisions that a function returns."""
        for value in outputs:
            if value.history.decision is not None:
                self._add_decision(value.history.decision)

    def _add_decision(self, decision: Decision) -> None:
        self._add(
            DECISION,
            decision.eqn,
            EqnContext(times=decision.times),
            f"ranks half results of {place(decision.matmul)}, where rounding decides "
            "between those that are close",
            "Keep that matmul in float32, by a rule for its name scope, or by "
            "mpjax.full_precision(fn).",
            site=decision.site,
            dtype=dtype_of(decision.eqn.invars[0]),
        )

    # Accumulation and functions in half.

    def _check_half(self, eqn: Any, context: EqnContext) -> None:
        dtype = dtype_of(eqn.outvars[0])
        if facts_of(eqn).is_matmul and accumulates_in_half(eqn):
            self._add(
                HALF_ACCUMULATION,
                eqn,
                context,
                f"precision={eqn.params['precision']} accumulates in half",
                "Ask for an algorithm that accumulates in float32, such as "
                "BF16_BF16_F32, or leave precision out.",
                flops=count_flops(eqn),
            )
        if not is_half(dtype):
            return
        terms = num_terms(eqn)
        if terms > _FEW_TERMS:
            self._add(
                HALF_ACCUMULATION,
                eqn,
                context,
                f"{terms} numbers are added up (or multiplied) in {dtype}, "
                + stall_message(dtype),
                accumulation_remedy(eqn),
            )
        if facts_of(eqn).is_sensitive:
            self._add(
                HALF_FUNCTION,
                eqn,
                context,
                rounding_message(eqn),
                "Cast to float32 before it, x.astype(jnp.float32), and back after it.",
            )

    def _check_carry(
        self,
        eqn: Any,
        context: EqnContext,
        value: AbstractValue,
        token: Any,
        trips: int | None,
    ) -> None:
        aval = eqn.outvars[token[1]].aval
        if value.accumulated is None or value.accumulated[0] != token:
            return
        if not is_half(aval.dtype) or (trips is not None and trips <= _FEW_TERMS):
            return
        loop = f"{trips} iterations" if trips else "a while loop"
        remedy = "Begin with zeros in float32, and cast the total after the loop."
        if context.is_backward:
            remedy = (
                "It is the gradient of a loop constant (weights): keep the constant in "
                "float32 and cast it inside the loop, as mpjax.autocast does."
            )
        self._add(
            HALF_ACCUMULATION,
            eqn,
            context,
            f"a {aval.dtype} total is carried over {loop}, "
            + stall_message(aval.dtype),
            remedy,
            site=value.accumulated[1],
            dtype=aval.dtype,
        )

    # Float32 where half was intended.

    def _check_operands(
        self,
        eqn: Any,
        values: list[AbstractValue],
        context: EqnContext,
        out: AbstractValue,
    ) -> AbstractValue:
        operands = [
            (x, v)
            for x, v in zip(eqn.invars, values, strict=True)
            if is_inexact_aval(x.aval)
        ]
        dtypes = {dtype_of(x) for x, _ in operands}
        if facts_of(eqn).is_matmul:
            return self._check_matmul(eqn, dtypes, _leak(values), context, out)
        promoted = [v for _, v in operands if _is_promoted(v, eqn)]
        others = [v for _, v in operands if not _is_promoted(v, eqn)]
        if context.is_rewritten or dtypes != {np.dtype(np.float32)} or not promoted:
            return out
        halves = {str(dtype_of(v.cast.invars[0])) for v in promoted}
        met_constant = others and all(v.is_constant for v in others)
        if not met_constant and (others or len(halves) == 1):
            self.escaped_leaks.add(_leak(others))
            return out
        half = " and ".join(sorted(halves))
        if others:
            message = f"{half} met float32 that depends on no floating argument (a "
            message += "constant, integers, random numbers)"
            remedy = (
                "Give the constant the other operand's dtype (jnp.asarray(c, x.dtype), "
                "or dtype=x.dtype in the call of jnp or jax.nn that makes it), or make "
                "it a Python number; where float32 is intended, write "
                "x.astype(jnp.float32)."
            )
        else:
            message = f"{half} met"
            remedy = "Cast one to the other's dtype, x.astype(y.dtype)."
        message += ": the result, and all that follows from it, is float32"
        self._add(LEAK, eqn, context, message, remedy)
        return dataclasses.replace(out, leak=out.leak or context.source)

    def _check_matmul(
        self, eqn: Any, dtypes: set, leak: str, context: EqnContext, out: AbstractValue
    ) -> AbstractValue:
        self.escaped_leaks.add(leak)
        operands = {dtype_of(x) for x in eqn.invars[:2]}
        # A matmul takes two float8 formats as they are.
        is_float8 = all(dtype.itemsize == 1 for dtype in operands)
        is_mixed = len(operands) > 1 and any(map(is_half, operands)) and not is_float8
        if is_mixed:
            names = " x ".join(str(dtype_of(x)) for x in eqn.invars[:2])
            message = f"operands are {names}, so the matmul is computed in float32"
            message += f"; one is float32 since {leak}" if leak else ""
        elif leak and not context.is_rewritten and dtypes == {np.dtype(np.float32)}:
            message = f"an operand is float32 since {leak}"
        else:
            return out
        flops = count_flops(eqn)
        remedy = f"Remove the leak at {leak}." if leak else _MATMUL_REMEDY
        if context.is_backward and is_mixed:
            remedy += " In a backward pass, preferred_element_type may be the reason: "
            remedy += "leave it out, and cast the output."
        self._add(
            FLOAT32_MATMUL, eqn, context, message, remedy, flops=flops, dtype="float32"
        )
        return dataclasses.replace(out, leak=leak or context.source)

    # Casts.

    def _check_cast(
        self, eqn: Any, value: AbstractValue, context: EqnContext, out: AbstractValue
    ) -> AbstractValue:
        first = value.cast
        out = dataclasses.replace(
            out,
            site=value.site,
            cast=eqn,
            is_used_once=True,
            carried=value.carried,
            accumulated=value.accumulated,
        )
        # Casts of a backward pass are JAX's own, casts of a rewrite autocast's.
        if first is None or context.is_backward or context.is_rewritten:
            return out
        if not _is_explicit(eqn):
            return out
        before, between, after = (
            dtype_of(first.invars[0]),
            dtype_of(eqn.invars[0]),
            dtype_of(eqn.outvars[0]),
        )
        if "transpose(" in str(first.source_info.name_stack) or before != after:
            return out
        if is_half(before) and between == np.float32:
            message = f"{before} to float32 and back, with nothing done in float32"
            remedy = "Drop both casts, or move the computation between them."
        elif before == np.float32 and is_half(between) and value.is_used_once:
            message = f"float32 to {between} and back only rounds"
            remedy = (
                f"Drop the cast to {between}, or compute the value in float32: "
                "jnp.mean(x, dtype=jnp.float32)."
            )
        else:
            return out
        self._add(ROUND_TRIP, eqn, context, message, remedy)
        return out

    def _check_float64(
        self,
        eqn: Any,
        values: list[AbstractValue],
        context: EqnContext,
        out: AbstractValue,
    ) -> AbstractValue:
        wide = [v for v in eqn.outvars if dtype_of(v) in _WIDE]
        if not wide:
            return dataclasses.replace(out, is_float64=False)
        if self._wants_float64 or not any(map(_is_float64, wide)):
            return out
        if not any(v.is_float64 for v in values):
            self._add(
                FLOAT64,
                eqn,
                context,
                f"gives {dtype_of(wide[0])}, though no argument is float64",
                "Give the dtype: np.float32(x) for a NumPy number, dtype=jnp.float32 "
                "in calls of jnp that make or average arrays; NumPy's own default is "
                "float64.",
            )
        return dataclasses.replace(out, is_float64=True)


def _is_explicit(cast: Any) -> bool:
    """Whether the user's code casts, not a function of JAX such as jnp.sum."""
    traceback = cast.source_info.traceback
    if traceback is None or not short_source(cast):
        return False
    return any(frame.function_name in _CASTS for frame in traceback.frames)


def _leak(values: list[AbstractValue]) -> str:
    return next((v.leak for v in values if v.leak), "")


def _is_float64(var: Any) -> bool:
    """Whether a value is strongly float64: a Python number is not."""
    return dtype_of(var) in _WIDE and not getattr(var.aval, "weak_type", False)


def _is_promoted(value: AbstractValue, consumer: Any) -> bool:
    """Whether a half value became float32 only because `consumer` promotes it.

    JAX leaves two traces of a promotion. Where the operation is a jit that is inlined
    (`x * y`), cast and operation share one traceback; elsewhere `promote_dtypes` makes
    the cast.
    """
    cast = value.cast
    if cast is None or not is_half(dtype_of(cast.invars[0])):
        return False
    if dtype_of(cast.outvars[0]) != np.float32:
        return False
    traceback = cast.source_info.traceback
    if traceback is None:
        return False
    if traceback is consumer.source_info.traceback:
        return True
    return any(
        frame.function_name.startswith("promote_dtypes") and "jax" in frame.file_name
        for frame in traceback.frames
    )
