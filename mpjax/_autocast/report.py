"""What autocast does to a function: FLOPs per dtype, what stays float32, and why.

And which arrays the function then saves for its backward pass.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mpjax._autocast.api import make_settings
from mpjax._autocast.eligibility import is_reduced_precision
from mpjax._autocast.pipeline import run_pipeline
from mpjax._autocast.rewrite import Rewriter
from mpjax._autocast.saved import SavedArray, find_saved
from mpjax._autocast.tracing import make_jaxpr
from mpjax._jaxpr.core import inner_jaxprs, is_inexact_aval, walk
from mpjax._jaxpr.flatten import FlatFunction, flatten, refuse_modules
from mpjax._jaxpr.flops import count_flops
from mpjax._jaxpr.primitives import Kind, facts_of
from mpjax._jaxpr.provenance import (
    RESERVED_AUTOCAST,
    RESERVED_FULL,
    RESERVED_HALF,
    is_reserved,
    join_scope,
)
from mpjax._report import (
    plain_table,
    print_report,
    rich_group,
    rich_table,
    shares,
    short_source,
)
from mpjax.policy import PolicyLike, PolicyRules

_COLUMNS = ("primitive", "dtype", "MFLOP", "calls", "scope", "source", "why")
_SAVED_COLUMNS = (
    "dtype",
    "shape",
    "MB",
    "count",
    "primitive",
    "scope",
    "source",
    "why",
)
_NUM_SAVED_SHOWN = 15
_NOT_UNDERSTOOD = "not understood: runs as traced"
_INSIDE = {
    RESERVED_AUTOCAST: "inside another autocast",
    RESERVED_FULL: "inside full_precision",
    RESERVED_HALF: "inside half_precision",
}
_NOT_ENTERED = "not understood: the matmuls inside run as traced"


@dataclasses.dataclass(frozen=True)
class AutocastRecord:
    """One operation of a function; operations that look the same here are merged.

    Attributes:
      primitive: name of the JAX primitive.
      dtype: dtype of its result under autocast; `float8` for a matmul of float8
        operands, whose result is bfloat16.
      reason: why it does not run in half, or in half although the policy is
        `mixed_float8`; empty if it runs in what the policy asks for.
      scope: its name scope.
      source: the user's source line, `model.py:12 (loss_fn)`.
      flops: FLOPs of all its calls together.
      num_calls: how often it runs; a `while` body and each branch of a `cond` once.
    """

    primitive: str
    dtype: str
    reason: str
    scope: str
    source: str
    flops: int
    num_calls: int


@dataclasses.dataclass(frozen=True)
class AutocastReport:
    """Every floating-point operation of a function under autocast.

    `print(report)` gives a plain table of the operations that do arithmetic,
    `report.print()` a coloured table on a terminal where rich is installed,
    `report.to_dict()` all data. If the function has a backward pass, a second table
    lists the largest arrays that are saved for it.

    Attributes:
      records: the operations, those with most FLOPs first.
      unused_names: names in `low=` or `high=` that the function does not contain.
      unused_rules: patterns of rules that matched no matmul.
      saved: the arrays that are saved for the backward pass, the largest first: what to
        look at to make a model smaller. What XLA computes again from saved arrays is
        left out, and so are the arguments of the function themselves.
    """

    records: tuple[AutocastRecord, ...]
    unused_names: tuple[str, ...] = ()
    unused_rules: tuple[str, ...] = ()
    saved: tuple[SavedArray, ...] = ()

    def saved_bytes(self) -> int:
        """Returns the bytes of all arrays that are saved for the backward pass.

        A compiled step's temporaries are these, and what it holds for a short time:
        see `mpjax.cost.analyze`.
        """
        return sum(array.num_bytes for array in self.saved)

    def flops_by_dtype(self) -> dict[str, int]:
        """Returns the FLOPs that run in each dtype, most first."""
        total: dict[str, int] = collections.Counter()
        for record in self.records:
            total[record.dtype] += record.flops
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def left_in_float32(self) -> tuple[AutocastRecord, ...]:
        """Returns the operations that autocast left in float32, with the reason."""
        return tuple(r for r in self.records if r.reason and r.dtype == "float32")

    def not_understood(self) -> tuple[AutocastRecord, ...]:
        """Returns the operations whose primitive mpjax's table does not know."""
        reasons = (_NOT_UNDERSTOOD, _NOT_ENTERED)
        return tuple(r for r in self.records if r.reason in reasons)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, ready for JSON."""
        return {
            "flops_by_dtype": self.flops_by_dtype(),
            "records": [dataclasses.asdict(record) for record in self.records],
            "unused_names": list(self.unused_names),
            "unused_rules": list(self.unused_rules),
            "saved_bytes": self.saved_bytes(),
            "saved": [dataclasses.asdict(array) for array in self.saved],
        }

    def print(self) -> None:
        """Prints it through rich on a terminal if rich is installed, else as text."""
        print_report(self)

    def __rich__(self) -> Any:
        table = rich_table(_COLUMNS, self._rows())
        parts = [self._summary(), table, *self._warnings()]
        if self.saved:
            parts += [
                self._saved_summary(),
                rich_table(_SAVED_COLUMNS, self._saved_rows()),
            ]
        return rich_group(*parts)

    def __str__(self) -> str:
        table = plain_table(_COLUMNS, self._rows())
        lines = [self._summary(), table, *self._warnings()]
        if self.saved:
            saved = plain_table(_SAVED_COLUMNS, self._saved_rows())
            lines += ["", self._saved_summary(), saved]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, ...]]:
        """Returns a row per operation that does arithmetic or is not understood."""
        unknown = self.not_understood()
        shown = (r for r in self.records if r.flops or r in unknown)
        return [
            (
                r.primitive,
                r.dtype,
                f"{r.flops / 1e6:.3g}",
                str(r.num_calls),
                r.scope,
                r.source,
                r.reason,
            )
            for r in shown
        ]

    def _saved_rows(self) -> list[tuple[str, ...]]:
        return [
            (
                x.dtype,
                "x".join(map(str, x.shape)),
                f"{x.num_bytes / 1e6:.3g}",
                str(x.count),
                x.primitive,
                x.scope,
                x.source,
                x.reason,
            )
            for x in self.saved[:_NUM_SAVED_SHOWN]
        ]

    def _saved_summary(self) -> str:
        total = f"saved for the backward pass: {self.saved_bytes() / 1e6:.3g} MB"
        num_left = len(self.saved) - _NUM_SAVED_SHOWN
        return f"{total}; {num_left} smaller rows not shown" if num_left > 0 else total

    def _summary(self) -> str:
        parts = shares(self.flops_by_dtype(), "MFLOP")
        return ", ".join(parts) or "no floating-point operations"

    def _warnings(self) -> list[str]:
        warnings = []
        if self.unused_names:
            names = ", ".join(self.unused_names)
            warnings.append(f"in low= or high=, but not in the function: {names}")
        if self.unused_rules:
            names = ", ".join(self.unused_rules)
            warnings.append(f"rules that match no matmul's name scope: {names}")
        return warnings


def autocast_report(
    fn: Callable[..., Any],
    policy: PolicyLike | PolicyRules = "mixed_bfloat16",
    *,
    low: Collection[str] = (),
    high: Collection[str] = (),
) -> Callable[..., AutocastReport]:
    """Reports what `autocast` does to a function, operation by operation.

    Takes the function and returns a function, as `autocast` does.

    Args:
      fn: as in `autocast`; `jax.value_and_grad(loss_fn)` reports both passes, and what
        is saved between them, also for a loss that goes to `make_train_step`.
      policy: as in `autocast`.
      low: as in `autocast`.
      high: as in `autocast`.

    Returns:
      A function that takes the arguments of `fn`, or `jax.ShapeDtypeStruct` in their
      place, and returns an `AutocastReport`. Nothing is computed.

    >>> import jax
    >>> report = autocast_report(lambda x, w: jax.numpy.exp(x @ w))
    >>> struct = jax.ShapeDtypeStruct((512, 512), "float32")
    >>> report(struct, struct).flops_by_dtype()
    {'bfloat16': 268435456, 'float32': 262144}

    What a loss saves for its backward pass:

    >>> batch = jax.ShapeDtypeStruct((4096, 512), "float32")
    >>> def loss_fn(w, x):
    ...     return jax.numpy.sum(jax.numpy.tanh(x @ w) @ w)
    >>> step = jax.value_and_grad(loss_fn)
    >>> for saved in autocast_report(step)(struct, batch).saved:
    ...     print(saved.num_bytes, saved.dtype, saved.shape, saved.primitive)
    4194304 bfloat16 (4096, 512) convert_element_type
    4194304 bfloat16 (4096, 512) tanh
    524288 bfloat16 (512, 512) convert_element_type
    """
    settings = make_settings(policy, low, high)

    def report(*args, **kwargs) -> AutocastReport:
        refuse_modules(fn, args, kwargs)
        arrays, spec = flatten((args, kwargs))
        jaxpr = make_jaxpr(FlatFunction(fn, spec), *arrays, rules=settings.rules)
        log = _Log(settings.kinds)
        Rewriter(settings, run_pipeline, log).rewrite(jaxpr)
        unused = sorted({*low, *high} - log.seen)
        records = log.records()
        reasons = {
            (r.primitive, r.source): r.reason for r in records if r.dtype == "float32"
        }
        rewritten = run_pipeline(jaxpr, settings)
        saved = find_saved(rewritten, reasons if rewritten is not jaxpr else {})
        return AutocastReport(
            records, tuple(unused), settings.rules.unused_rules(), saved
        )

    return report


class _Log:
    """Collects the decisions of a `Rewriter`."""

    def __init__(self, kinds: Mapping[str, Kind]):
        self.seen: set[str] = set()
        self._kinds = kinds
        self._counts: dict[tuple, list[int]] = {}

    def __call__(self, eqn: Any, scope: str, times: int, dtype: Any, reason: str):
        name = eqn.primitive.name
        self.seen.add(name)
        if is_reserved(eqn):
            (inside,) = (why for name, why in _INSIDE.items() if is_reserved(eqn, name))
            for jaxpr in inner_jaxprs(eqn):
                for inner, inner_scope, inner_times in walk(jaxpr, scope, times):
                    if not inner_jaxprs(inner):
                        self._add(inner, inner_scope, inner_times, None, inside)
            return
        if dtype is None and not reason:
            reason = self._usual_reason(eqn)
        self._add(eqn, join_scope(scope, eqn), times, dtype, reason)

    def _usual_reason(self, eqn: Any) -> str:
        name = eqn.primitive.name
        if is_reduced_precision(eqn):
            return "runs as traced"
        kind = self._kinds.get(name)
        if kind is Kind.FLOAT32:
            return "loses too much, or overflows, in half"
        if kind in (Kind.PROMOTE, Kind.CUSTOM):
            return "an operand is float32"
        if facts_of(eqn).is_known:
            return "runs as traced"
        inner = inner_jaxprs(eqn)
        if not inner:
            return _NOT_UNDERSTOOD
        if any(facts_of(e).is_matmul for jaxpr in inner for e, _, _ in walk(jaxpr)):
            return _NOT_ENTERED
        return "runs as traced"

    def _add(self, eqn: Any, scope: str, times: int, dtype: Any, reason: str) -> None:
        floats = [v.aval for v in eqn.outvars if is_inexact_aval(v.aval)]
        if not floats:
            return
        name = str(dtype or floats[0].dtype)
        is_as_traced_in_half = dtype is None and name in ("bfloat16", "float16")
        why = "" if is_as_traced_in_half else reason
        row = (eqn.primitive.name, name, why, scope, short_source(eqn))
        count = self._counts.setdefault(row, [0, 0])
        count[0] += times * count_flops(eqn)
        count[1] += times

    def records(self) -> tuple[AutocastRecord, ...]:
        found = [
            AutocastRecord(*row, flops=flops, num_calls=num_calls)
            for row, (flops, num_calls) in self._counts.items()
        ]
        return tuple(sorted(found, key=lambda record: -record.flops))
