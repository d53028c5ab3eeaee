"""The rules by which a precision report finds fault with a function."""

import dataclasses
from typing import Any

import numpy as np

from mpjax._jaxpr.core import dtype_of, is_inexact_aval, open_jaxpr
from mpjax._jaxpr.flops import count_flops
from mpjax._report import short_source
from mpjax.numerics._accumulation import (
    accumulated,
    accumulates_in_half,
    is_half,
    num_terms,
)
from mpjax.numerics._findings import (
    FLOAT32_MATMUL,
    FLOAT64,
    HALF_ACCUMULATION,
    HALF_FUNCTION,
    LEAK,
    ROUND_TRIP,
    Finding,
    reduction_remedy,
    what_it_loses,
    when_it_stalls,
)
from mpjax.numerics._flow import MOVEMENT, Flow, Site, Value
from mpjax.numerics._place import Place
from mpjax.numerics._tap import MATMULS

_SENSITIVE = frozenset(
    (
        "cosh",
        "digamma",
        "exp",
        "exp2",
        "expm1",
        "lgamma",
        "log",
        "log1p",
        "log2",
        "pow",
        "sinh",
    )
)
_CASTS = ("astype", "convert_element_type", "asarray", "array")
_WIDE = frozenset((np.dtype(np.float64), np.dtype(np.complex128)))
# Sums of no more terms lose no more than other operations do.
_FEW = 8
_MATMUL_REMEDY = (
    "Cast the float32 operand to half before the matmul (what made it, if that is "
    "shared); accumulation is in float32 all the same."
)


def find(jaxpr: Any) -> tuple[list[Finding], list[Value]]:
    """Returns the findings in a jaxpr, and what is known of its outputs."""
    lint = _Lint(jaxpr)
    inputs = [
        Value(
            is_constant=not is_inexact_aval(v.aval),
            is_float64=_is_float64(v),
        )
        for v in open_jaxpr(jaxpr).invars
    ]
    outputs = lint.flow.run(jaxpr, inputs, Place())
    lint.spread |= {v.leak for v in outputs}
    return [x for x in lint.found if x.kind != LEAK or x.source in lint.spread], outputs


class _Lint:
    """The rules.

    Attributes:
      found: all findings. A leak that is cast back is none.
      spread: the leaks that are not.
    """

    def __init__(self, jaxpr: Any):
        self.found: list[Finding] = []
        self.spread: set[str] = set()
        self.flow = Flow(self._rule, self._check_carry)
        self._wants_float64 = any(map(_is_float64, open_jaxpr(jaxpr).invars))

    def _add(
        self,
        kind: str,
        eqn: Any,
        place: Place,
        message: str,
        remedy: str,
        *,
        site: Site | None = None,
        dtype: Any = None,
        flops: int = 0,
    ) -> None:
        if self.flow.is_muted:
            return
        site = site or _site(eqn, place)
        self.found.append(
            Finding(
                kind,
                site.primitive,
                str(dtype or dtype_of(eqn.outvars[0])),
                site.scope,
                site.source,
                message,
                remedy,
                num_calls=place.times,
                flops=flops * place.times,
            )
        )

    def _rule(self, eqn: Any, values: list[Value], place: Place) -> Value:
        name = eqn.primitive.name
        is_in_half = any(is_half(dtype_of(x)) for x in (*eqn.invars, *eqn.outvars))
        out = Value(
            is_constant=all(v.is_constant for v in values) and not is_in_half,
            site=_site(eqn, place),
            # A product with a cotangent does not make that leak.
            leak="" if place.is_backward else _leak(values),
            depends_on=frozenset().union(*(v.depends_on for v in values)),
        )
        if not eqn.outvars or not is_inexact_aval(eqn.outvars[0].aval):
            return dataclasses.replace(out, leak="")
        if name == "convert_element_type":
            out = self._check_cast(eqn, values[0], place, out)
        elif name in MOVEMENT and values:
            out = dataclasses.replace(values[0], is_constant=out.is_constant)
        else:
            out = self._check_operands(eqn, values, place, out)
            out = dataclasses.replace(out, accumulated=accumulated(eqn, values, out))
        self._check_half(eqn, place)
        if dtype_of(eqn.outvars[0]) != np.float32:
            out = dataclasses.replace(out, leak="")
        return self._check_float64(eqn, values, place, out)

    # Accumulation and functions in half.

    def _check_half(self, eqn: Any, place: Place) -> None:
        name = eqn.primitive.name
        dtype = dtype_of(eqn.outvars[0])
        if name in MATMULS and accumulates_in_half(eqn):
            self._add(
                HALF_ACCUMULATION,
                eqn,
                place,
                f"precision={eqn.params['precision']} adds up in half",
                "Ask for an algorithm that accumulates in float32, such as "
                "BF16_BF16_F32, or for none.",
                flops=count_flops(eqn),
            )
        if not is_half(dtype):
            return
        terms = num_terms(eqn)
        if terms > _FEW:
            self._add(
                HALF_ACCUMULATION,
                eqn,
                place,
                f"{terms} numbers are added up (or multiplied) in {dtype}, "
                + when_it_stalls(dtype),
                reduction_remedy(name),
            )
        if name in _SENSITIVE:
            self._add(
                HALF_FUNCTION,
                eqn,
                place,
                what_it_loses(name, dtype),
                "Cast to float32 before it, x.astype(jnp.float32), and back after.",
            )

    def _check_carry(
        self, eqn: Any, place: Place, value: Value, token: Any, trips: int | None
    ) -> None:
        aval = eqn.outvars[token[1]].aval
        if value.accumulated is None or value.accumulated[0] != token:
            return
        if not is_half(aval.dtype) or (trips is not None and trips <= _FEW):
            return
        often = f"{trips} iterations" if trips else "a while loop"
        remedy = "Begin with zeros in float32, and cast the total after the loop."
        if place.is_backward:
            remedy = (
                "It is the gradient of what the loop holds constant (weights): keep "
                "that in float32 and cast it inside, as mpjax.autocast does."
            )
        self._add(
            HALF_ACCUMULATION,
            eqn,
            place,
            f"a {aval.dtype} total is carried over {often}, "
            + when_it_stalls(aval.dtype),
            remedy,
            site=value.accumulated[1],
            dtype=aval.dtype,
        )

    # Float32 where half was meant.

    def _check_operands(
        self, eqn: Any, values: list[Value], place: Place, out: Value
    ) -> Value:
        operands = [
            (x, v)
            for x, v in zip(eqn.invars, values, strict=True)
            if is_inexact_aval(x.aval)
        ]
        dtypes = {dtype_of(x) for x, _ in operands}
        if eqn.primitive.name in MATMULS:
            return self._check_matmul(eqn, dtypes, _leak(values), place, out)
        promoted = [v for _, v in operands if _is_promoted(v, eqn)]
        others = [v for _, v in operands if not _is_promoted(v, eqn)]
        if place.is_rewritten or dtypes != {np.dtype(np.float32)} or not promoted:
            return out
        halves = {str(dtype_of(v.cast.invars[0])) for v in promoted}
        met_constant = others and all(v.is_constant for v in others)
        if not met_constant and (others or len(halves) == 1):
            self.spread.add(_leak(others))
            return out
        half = " and ".join(sorted(halves))
        if others:
            message = f"{half} met float32 made of no floating argument (a constant, "
            message += "integers, random numbers): this and what follows is float32"
            remedy = (
                "Give the constant the dtype of what it meets (jnp.asarray(c, x.dtype),"
                " dtype=x.dtype where jnp or jax.nn makes it), or make it a Python "
                "number; if float32 is meant, say so by x.astype(jnp.float32)."
            )
        else:
            message = f"{half} met: this and what follows is float32"
            remedy = "Cast one to the other's dtype, x.astype(y.dtype)."
        self._add(LEAK, eqn, place, message, remedy)
        return dataclasses.replace(out, leak=out.leak or place.source)

    def _check_matmul(
        self, eqn: Any, dtypes: set, leak: str, place: Place, out: Value
    ) -> Value:
        self.spread.add(leak)
        operands = {dtype_of(x) for x in eqn.invars[:2]}
        is_mixed = len(operands) > 1 and any(map(is_half, operands))
        if is_mixed:
            names = " x ".join(str(dtype_of(x)) for x in eqn.invars[:2])
            message = f"operands are {names}, so both are computed with in float32"
            message += f"; one is float32 since {leak}" if leak else ""
        elif leak and not place.is_rewritten and dtypes == {np.dtype(np.float32)}:
            message = f"an operand is float32 since {leak}"
        else:
            return out
        flops = count_flops(eqn)
        remedy = f"Mend what is at {leak}." if leak else _MATMUL_REMEDY
        if place.is_backward and is_mixed:
            remedy += " In a backward pass it may come of preferred_element_type: "
            remedy += "leave that out, and cast the output."
        self._add(
            FLOAT32_MATMUL, eqn, place, message, remedy, flops=flops, dtype="float32"
        )
        return dataclasses.replace(out, leak=leak or place.source)

    # Casts.

    def _check_cast(self, eqn: Any, value: Value, place: Place, out: Value) -> Value:
        first = value.cast
        out = dataclasses.replace(
            out,
            site=value.site,
            cast=eqn,
            is_used_once=True,
            carried=value.carried,
            accumulated=value.accumulated,
        )
        # In a backward pass they are JAX's, and those of a rewrite are autocast's.
        if first is None or place.is_backward or place.is_rewritten:
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
                f"Drop the cast to {between}, or ask what makes it for float32: "
                "jnp.mean(x, dtype=jnp.float32)."
            )
        else:
            return out
        self._add(ROUND_TRIP, eqn, place, message, remedy)
        return out

    def _check_float64(
        self, eqn: Any, values: list[Value], place: Place, out: Value
    ) -> Value:
        wide = [v for v in eqn.outvars if dtype_of(v) in _WIDE]
        if not wide:
            return dataclasses.replace(out, is_float64=False)
        if self._wants_float64 or not any(map(_is_float64, wide)):
            return out
        if not any(v.is_float64 for v in values):
            self._add(
                FLOAT64,
                eqn,
                place,
                f"gives {dtype_of(wide[0])}, though no argument is float64",
                "Give the dtype: np.float32(x) for a NumPy number, dtype=jnp.float32 "
                "for what jnp makes or averages; NumPy's own default is float64.",
            )
        return dataclasses.replace(out, is_float64=True)


def _site(eqn: Any, place: Place) -> Site:
    return Site(eqn.primitive.name, place.scope, place.source)


def _is_explicit(cast: Any) -> bool:
    """Whether the user's code casts, not a function of JAX's, such as jnp.sum."""
    traceback = cast.source_info.traceback
    if traceback is None or not short_source(cast):
        return False
    return any(frame.function_name in _CASTS for frame in traceback.frames)


def _leak(values: list[Value]) -> str:
    return next((v.leak for v in values if v.leak), "")


def _is_float64(var: Any) -> bool:
    """Whether a value is strongly float64: a Python number is not."""
    return dtype_of(var) in _WIDE and not getattr(var.aval, "weak_type", False)


def _is_promoted(value: Value, consumer: Any) -> bool:
    """Whether a half value became float32 only because of the op that it goes to.

    JAX leaves two traces. Where an operation is a jit that is inlined (`x * y`), cast
    and operation have one traceback. Else the cast is made by `promote_dtypes`.
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
