"""Findings of a precision report: their kinds, the record, messages and remedies."""

import collections
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax._jaxpr.primitives import facts_of

HALF_ACCUMULATION = "accumulation in half"
HALF_FUNCTION = "sensitive function in half"
CANCELLATION = "difference of half results"
DECISION = "decision by half results"
LEAK = "leak to float32"
FLOAT32_MATMUL = "matmul in float32"
FLOAT64 = "float64"
RETRACE = "retrace"
ROUND_TRIP = "cast there and back"


@dataclasses.dataclass(frozen=True)
class Finding:
    """An operation whose precision is not what it should be.

    Attributes:
      kind: "accumulation in half", "sensitive function in half", "difference of half
        results", "decision by half results", "leak to float32", "matmul in float32",
        "float64", "retrace" or "cast there and back".
      primitive: name of the operation.
      dtype: dtype of its result; for a matmul the dtype in which it computes.
      scope: its name scope.
      source: the user's source line, `model.py:12:4 (loss_fn)`.
      message: what is wrong.
      remedy: what to do about it.
      num_calls: how often it runs; a `while` body and each branch of a `cond` count
        once.
      flops: FLOPs of all its calls together, for a matmul; else 0.
    """

    kind: str
    primitive: str
    dtype: str
    scope: str
    source: str
    message: str
    remedy: str
    num_calls: int = 1
    flops: int = 0

    def __str__(self) -> str:
        where = place(self)
        cost = [f"{self.num_calls} calls"] if self.num_calls > 1 else []
        cost += [f"{self.flops / 1e6:.3g} MFLOP"] if self.flops else []
        where += f" ({', '.join(cost)})" if cost else ""
        return f"{self.kind}: {where}: {self.message}. {self.remedy}"


def merge(findings: list[Finding]) -> tuple[Finding, ...]:
    """Returns the findings, with similar ones merged into one.

    The findings with the most FLOPs come first, the others in program order.
    """
    alike: dict[Any, list[Finding]] = collections.defaultdict(list)
    for x in findings:
        alike[_likeness(x)].append(x)
    merged = [
        dataclasses.replace(
            same[0],
            num_calls=sum(
                x.num_calls for x in same if x.primitive == same[0].primitive
            ),
            flops=sum(x.flops for x in same),
        )
        for same in alike.values()
    ]
    return tuple(sorted(merged, key=lambda x: -x.flops))


def _likeness(x: Finding) -> Any:
    if x.kind == FLOAT32_MATMUL:  # Merges the matmuls of its backward pass with it.
        return x.kind, x.primitive, x.scope, x.source
    if x.kind == FLOAT64:  # The first operation of a line explains the others.
        return x.kind, x.scope, tuple(x.source.split(":")[:2])
    return dataclasses.replace(x, num_calls=0, flops=0)


def stall_message(dtype: Any) -> str:
    """Returns the size at which a long sum in half stops growing, as text."""
    ratio = 2 ** (jnp.finfo(dtype).nmant + 1)
    return f"where a sum stalls once it is {ratio} times its terms"


def rounding_message(eqn: Any) -> str:
    """Returns how a sensitive function in half goes wrong."""
    dtype = eqn.outvars[0].aval.dtype
    limit = facts_of(eqn).float16_limit
    if dtype == np.float16 and limit:
        return f"overflows in float16 beyond {limit}"
    digits = 3 if dtype == np.float16 else 2
    return f"is rounded to {digits} digits in {dtype}, and so is its operand"


def accumulation_remedy(eqn: Any) -> str:
    """Returns how to accumulate in float32 instead."""
    name = eqn.primitive.name
    if name == "scatter-add":
        return (
            "Scatter into float32 and cast the result, or pass unique_indices=True if "
            "no index repeats."
        )
    if name == "reduce_sum":
        return (
            "Use jnp.sum, which accumulates in float32, or cast to float32 before it; "
            "for the gradient of a broadcast (a bias), keep the parameter in float32, "
            "or differentiate under mpjax.autocast."
        )
    if facts_of(eqn).accumulates and hasattr(jnp, name):
        return f"Accumulate in float32, jnp.{name}(x, dtype=jnp.float32), cast after."
    return "Accumulate in float32, x.astype(jnp.float32), and cast after."


def place(site: Any) -> str:
    """Returns a site as text: `dot_general in router at model.py:12:4 (route)`."""
    where = site.primitive
    where += f" in {site.scope}" if site.scope else ""
    return where + (f" at {site.source}" if site.source else "")
