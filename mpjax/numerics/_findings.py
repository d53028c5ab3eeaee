"""What a precision report finds fault with: the record of a place, and the kinds."""

import collections
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

HALF_ACCUMULATION = "accumulation in half"
HALF_FUNCTION = "sensitive function in half"
LEAK = "leak to float32"
FLOAT32_MATMUL = "matmul in float32"
FLOAT64 = "float64"
RETRACE = "retrace"
ROUND_TRIP = "cast there and back"

# Where float16 overflows: exp(11.1) is 66171.
_LARGEST_ARGUMENT = {
    "exp": "11",
    "expm1": "11",
    "exp2": "16",
    "sinh": "11",
    "cosh": "11",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """A place where a function's precision is not what it should be.

    Attributes:
      kind: "accumulation in half", "sensitive function in half", "leak to float32",
        "matmul in float32", "float64", "retrace" or "cast there and back".
      primitive: name of the operation.
      dtype: of its result; of a matmul, in which it computes.
      scope: its name scope.
      source: the user's source line, `model.py:12:4 (loss_fn)`.
      message: what is wrong.
      remedy: what to do about it.
      num_calls: how often it runs; a `while` body and each branch of a `cond` once.
      flops: of all calls together, for a matmul.
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
        where = self.primitive
        where += f" in {self.scope}" if self.scope else ""
        where += f" at {self.source}" if self.source else ""
        cost = [f"{self.num_calls} calls"] if self.num_calls > 1 else []
        cost += [f"{self.flops / 1e6:.3g} MFLOP"] if self.flops else []
        where += f" ({', '.join(cost)})" if cost else ""
        return f"{self.kind}: {where}: {self.message}. {self.remedy}"


def merge(findings: list[Finding]) -> tuple[Finding, ...]:
    """Returns the findings, those alike as one.

    Those with most FLOPs come first, then in the order of the program.
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
    if x.kind == FLOAT32_MATMUL:  # So are those of its backward pass.
        return x.kind, x.primitive, x.scope, x.source
    if x.kind == FLOAT64:  # What a line does with it follows from the first.
        return x.kind, x.scope, tuple(x.source.split(":")[:2])
    return dataclasses.replace(x, num_calls=0, flops=0)


def when_it_stalls(dtype: Any) -> str:
    """Returns what becomes of a long sum in half."""
    ratio = 2 ** (jnp.finfo(dtype).nmant + 1)
    return f"where a sum stalls once it is {ratio} times its terms"


def reduction_remedy(name: str) -> str:
    """Returns how to accumulate otherwise, by the name of the primitive."""
    if name == "scatter-add":
        return (
            "Scatter into float32 and cast the result, or pass unique_indices=True if "
            "no index repeats."
        )
    if name in ("reduce_sum", "reduce"):
        return (
            "Use jnp.sum, which accumulates in float32, or cast to float32 before; for "
            "the gradient of a broadcast (a bias), keep the parameter in float32, or "
            "differentiate under mpjax.autocast."
        )
    if name in ("cumsum", "cumprod"):
        return f"Accumulate in float32, jnp.{name}(x, dtype=jnp.float32), cast after."
    return "Accumulate in float32, x.astype(jnp.float32), and cast after."


def what_it_loses(name: str, dtype: Any) -> str:
    """Returns why a function is better not taken in half."""
    if dtype == np.float16 and name in _LARGEST_ARGUMENT:
        return f"overflows in float16 beyond {_LARGEST_ARGUMENT[name]}"
    if dtype == np.float16 and name == "pow":
        return "overflows in float16 beyond 65504"
    digits = 3 if dtype == np.float16 else 2
    return f"is rounded to {digits} digits in {dtype}, and so is what goes in"
