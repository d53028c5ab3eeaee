"""FLOPs and bytes of a function by dtype and by name scope, with findings."""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._jaxpr.core import dtype_of, is_inexact_aval, jaxprs_meant, num_bytes, walk
from mpjax._jaxpr.flatten import FlatFunction, flatten, refuse_modules
from mpjax._jaxpr.flops import count_flops
from mpjax._jaxpr.primitives import facts_of
from mpjax._report import (
    plain_table,
    print_report,
    rich_group,
    rich_table,
    shares,
    short_source,
)
from mpjax.numerics._findings import Finding, merge
from mpjax.numerics._flow import holds_operations
from mpjax.numerics._lint import find
from mpjax.numerics._retrace import find_retraces

_COLUMNS = ("scope", "dtype", "MFLOP", "MB", "calls")


@dataclasses.dataclass(frozen=True)
class PrecisionRecord:
    """One operation of a function, or several that agree in all fields but the counts.

    Attributes:
      primitive: its name.
      dtype: the dtype in which it computes; see `precision_report`.
      scope: its name scope.
      source: the user's source line, `model.py:12:4 (loss_fn)`.
      flops: floating-point operations of all calls together.
      moved_bytes: bytes read and written by all calls together.
      num_calls: how often it runs; a `while` body and each branch of a `cond` count
        once.
    """

    primitive: str
    dtype: str
    scope: str
    source: str
    flops: int
    moved_bytes: int
    num_calls: int


@dataclasses.dataclass(frozen=True)
class PrecisionReport:
    """What a function computes in which precision, and where that is wrong.

    `print(report)` prints plain tables, `report.print()` coloured ones on a terminal
    where rich is installed; `report.to_dict()` returns all data.

    Attributes:
      records: the operations, sorted by FLOPs, then by bytes, the largest first.
      findings: what should be changed, each a `Finding` with its remedy, sorted by
        FLOPs, the largest first.
    """

    records: tuple[PrecisionRecord, ...]
    findings: tuple[Finding, ...] = ()

    def flops_by_dtype(self) -> dict[str, int]:
        """Returns the FLOPs of each dtype, the largest count first."""
        return _add_up((r.dtype, r.flops) for r in self.records)

    def bytes_by_dtype(self) -> dict[str, int]:
        """Returns the bytes that the operations of each dtype move, largest first."""
        return _add_up((r.dtype, r.moved_bytes) for r in self.records)

    def flops_by_scope(self) -> dict[str, dict[str, int]]:
        """Returns the FLOPs of each dtype, by name scope; "" is outside any scope."""
        return self._by_scope("flops")

    def bytes_by_scope(self) -> dict[str, dict[str, int]]:
        """Returns the bytes of each dtype, by name scope; "" is outside any scope."""
        return self._by_scope("moved_bytes")

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, ready for JSON."""
        return {
            "flops_by_dtype": self.flops_by_dtype(),
            "bytes_by_dtype": self.bytes_by_dtype(),
            "flops_by_scope": self.flops_by_scope(),
            "bytes_by_scope": self.bytes_by_scope(),
            "records": [dataclasses.asdict(record) for record in self.records],
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def print(self) -> None:
        """Prints the report, through rich on a terminal if rich is installed."""
        print_report(self)

    def __rich__(self) -> Any:
        table = rich_table(_COLUMNS, self._rows())
        return rich_group(*self._summary(), table, *self._verdict())

    def __str__(self) -> str:
        table = plain_table(_COLUMNS, self._rows())
        return "\n".join([*self._summary(), table, *self._verdict()])

    def _by_scope(self, field: str) -> dict[str, dict[str, int]]:
        scopes = _add_up((r.scope, getattr(r, field)) for r in self.records)
        return {
            scope: _add_up(
                (r.dtype, getattr(r, field)) for r in self.records if r.scope == scope
            )
            for scope in scopes
        }

    def _rows(self) -> list[tuple[str, ...]]:
        totals: dict[tuple[str, str], list[int]] = {}
        for r in self.records:
            total = totals.setdefault((r.scope, r.dtype), [0, 0, 0])
            for i, number in enumerate((r.flops, r.moved_bytes, r.num_calls)):
                total[i] += number
        return [
            (scope, dtype, f"{flops / 1e6:.3g}", f"{moved / 1e6:.3g}", str(num_calls))
            for (scope, dtype), (flops, moved, num_calls) in totals.items()
            if flops or moved
        ]

    def _summary(self) -> list[str]:
        flops = {k: v for k, v in self.flops_by_dtype().items() if v}
        moved = {k: v for k, v in self.bytes_by_dtype().items() if v}
        return [
            ", ".join(shares(flops, "MFLOP")) or "no floating-point operations",
            ", ".join(shares(moved, "MB")) or "no bytes moved",
        ]

    def _verdict(self) -> list[str]:
        if not self.findings:
            return ["nothing found"]
        return [f"{len(self.findings)} found:", *(f"- {x}" for x in self.findings)]


def precision_report(fn: Callable[..., Any]) -> Callable[..., PrecisionReport]:
    """Tells in which precision a function computes, and where that is wrong.

    It takes the function and returns a function: `precision_report(fn)(*args)`. The
    function is traced, not run.

    Every operation counts, also inside jit, scan (times its length), while and cond
    (the body, and each branch, once), remat and functions with derivatives of their
    own; calls and loops themselves do not count.

    An operation's dtype is that of its first floating result. If no result is floating,
    as in a comparison, it is the dtype of the first floating operand, or else of the
    result. The dtype of a matmul or convolution is that of its operands, the wider one
    where they differ, whatever the dtype of its output: of `mixed_float8`,
    `float8_e5m2` where an operand is a cotangent.

    Bytes are operands read and results written, as if nothing were fused: an upper
    bound on what the compiled function moves, because XLA fuses most elementwise
    operations. Views (reshape, squeeze) move nothing; slices and gathers read as much
    as they return. FLOPs are counted as in `autocast_report`.

    The findings are

    - sums, cumulative sums, products and scatters of more than 8 numbers, and totals
      carried by a loop, in float16 or bfloat16 (matmuls accumulate in float32);
    - exponentials, logarithms and powers in float16 or bfloat16;
    - squared distances `a² + b² - 2ab` whose product is a half matmul;
    - `top_k`, `argmax` and `sort` by results of a half matmul, where the choice is used
      or returned (comparing it with labels, as for an accuracy, is not a use);
    - half that became float32 because it met a constant (a NumPy number,
      `jnp.linspace`, `jax.nn.one_hot`, random numbers), not by an explicit cast, and
      then reached a matmul or an output, or turned more half values into float32;
    - float32 matmuls that follow from such a leak, and matmuls of half with float32;
    - float64 where no argument is float64;
    - state whose output dtype, or weak type, differs from its input's, so that jit
      traces again;
    - casts to another dtype and back, with no computation between them.

    What `autocast` did inside its function is not a leak: see `autocast_report`.

    Args:
      fn: any function of pytrees, under the contract of `jax.jit`, for instance
        `jax.value_and_grad(loss_fn)` or a whole train step.

    Returns:
      A function with the arguments of `fn`, each of which may be
      a `jax.ShapeDtypeStruct`, that returns a `PrecisionReport`. Nothing is computed.

    Raises:
      TypeError: when the returned function is called with an NNX module.

    >>> struct = jax.ShapeDtypeStruct((512, 512), "bfloat16")
    >>> report = precision_report(lambda x, w: x @ w * jnp.float32(2))(struct, struct)
    >>> report.flops_by_dtype()
    {'bfloat16': 268435456, 'float32': 262144}
    >>> [finding.kind for finding in report.findings]
    ['leak to float32']
    """

    def report(*args: Any, **kwargs: Any) -> PrecisionReport:
        refuse_modules(fn, args, kwargs)
        arrays, spec = flatten((args, kwargs))
        flat = FlatFunction(fn, spec)
        with jax.disable_jit(False):
            jaxpr = jax.make_jaxpr(flat)(*arrays)
        findings, values = find(jaxpr)
        findings += find_retraces(args, jaxpr, values, spec, flat.out_spec)
        return PrecisionReport(_records(jaxpr), merge(findings))

    return report


def _records(jaxpr: Any) -> tuple[PrecisionRecord, ...]:
    counts: dict[tuple, list[int]] = {}
    for eqn, scope, source, times in _operations(jaxpr):
        dtype = _compute_dtype(eqn)
        if dtype is None:
            continue
        total = counts.setdefault((eqn.primitive.name, dtype, scope, source), [0, 0, 0])
        is_floating = any(is_inexact_aval(v.aval) for v in eqn.outvars)
        total[0] += times * count_flops(eqn) if is_floating else 0
        total[1] += times * _moved_bytes(eqn)
        total[2] += times
    records = [PrecisionRecord(*row, *total) for row, total in counts.items()]
    return tuple(sorted(records, key=lambda r: (-r.flops, -r.moved_bytes)))


def _operations(jaxpr: Any) -> Iterator[tuple[Any, str, str, int]]:
    """Yields `(eqn, scope, source, times)` of everything but calls and loops.

    An equation without a source line, in a jit of JAX's own, takes the call's line.
    """
    inside: dict[int, str | None] = {}
    for eqn, scope, times in walk(jaxpr):
        source = inside.get(id(eqn), "")
        if source is not None:
            source = short_source(eqn) or source
        is_operation = source is not None and not holds_operations(eqn)
        for sub in jaxprs_meant(eqn):
            # The scalar function of a reduction does not count on its own.
            own = None if is_operation or source is None else source
            inside.update((id(x), own) for x in getattr(sub, "eqns", ()))
        if is_operation:
            yield eqn, scope, source or "", times


def _compute_dtype(eqn: Any) -> str | None:
    operands = [x for x in eqn.invars if is_inexact_aval(x.aval)]
    if facts_of(eqn).is_matmul and operands:
        dtypes = [dtype_of(x) for x in operands[:2]]
        if any(dtype.itemsize == 1 for dtype in dtypes):  # JAX promotes no float8.
            return str(max(dtypes, key=lambda x: (x.itemsize, jnp.finfo(x).maxexp)))
        return str(jnp.promote_types(dtypes[0], dtypes[-1]))
    atoms = [v for v in eqn.outvars if is_inexact_aval(v.aval)] or operands
    dtypes = [dtype_of(x) for x in (*atoms, *eqn.outvars)]
    return str(dtypes[0]) if dtypes and dtypes[0] is not None else None


def _moved_bytes(eqn: Any) -> int:
    facts = facts_of(eqn)
    if facts.is_view:
        return 0
    written = sum(map(num_bytes, eqn.outvars))
    if facts.is_slice:
        return 2 * written + sum(map(num_bytes, eqn.invars[1:]))
    return written + sum(map(num_bytes, eqn.invars))


def _add_up(counts: Any) -> dict[str, int]:
    total: dict[str, int] = collections.Counter()
    for name, number in counts:
        total[name] += number
    return dict(sorted(total.items(), key=lambda item: -item[1]))
