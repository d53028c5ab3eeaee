"""What `--numerics` counted over a run, as a table from which the plot is drawn.

The numbers are those of the unscaled loss: what loss scaling multiplied by S is divided
by S here, gradients and backward matmuls alike.
"""

import math
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.harness.numerics import HI, LO
from experiments.harness.results import Column

BACKWARD = " (backward)"
SMALLEST = -24  # exponent of float16's smallest number, which is subnormal
EXPONENTS = np.arange(LO, HI + 1)
COLUMNS = (
    Column("operation", "operation"),
    Column("numbers", "kind"),
    Column("zero", "zero", "{:.1%}"),
    Column("below float16, first count", "first_lost", "{:.1%}"),
    Column("last count", "last_lost", "{:.1%}"),
)


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per operation and kind of numbers, for `numerics_figure`.

    Args:
      rows: a run's rows of metrics; rows of kind "numerics" hold the histograms.

    Returns:
      Rows with `operation`; `kind`, "values" or "cotangents"; `zero`, the share of
      zeros over all counts; `exponents`, exponent → share of all numbers; `scale`, the
      median exponent of the loss scale. Those of cotangents have `lost`, pairs of step
      and share of the nonzero numbers below float16's smallest, and its ends.
    """
    scales = {r["step"]: r["loss_scale"] for r in rows if r["kind"] == "train"}
    counted = [row for row in rows if row["kind"] == "numerics"]
    return [_summary(counted, *key, scales) for key in _keys(counted)]


def shares_lost(
    rows: list[dict[str, Any]], name: str, scales: dict[int, float]
) -> Iterator[tuple[int, float]]:
    """Yields the share of an operation's cotangents that float16 loses when unscaled.

    Args:
      rows: rows of kind "numerics".
      name: name of the operation.
      scales: step → the loss scale that multiplied the cotangents.

    Yields:
      `(step, share)`: the share of the nonzero numbers that are smaller than float16's
      smallest subnormal.
    """
    for row in rows:
        found = row["operations"].get(name, {}).get("cotangents")
        if found:
            counts = shifted(found["counts"], -scale_exponent(row, scales))
            nonzero = counts.sum() + found["below"] + found["above"]
            below = counts[EXPONENTS < SMALLEST].sum() + found["below"]
            yield row["step"], float(below / max(nonzero, 1))


def scale_exponent(row: dict[str, Any], scales: dict[int, float]) -> int:
    """Returns the exponent of the loss scale at a row's step; 0 where none is known."""
    return round(math.log2(scales.get(row["step"], 1.0) or 1.0))


def shifted(counts: list[int], shift: int) -> np.ndarray:
    """Shifts counts to other exponents; drops those that leave the range."""
    moved = np.zeros(len(counts))
    source = np.asarray(counts)
    if shift >= 0:
        moved[shift:] = source[: source.size - shift]
    else:
        moved[:shift] = source[-shift:]
    return moved


def num_values_of(found: dict[str, Any]) -> int:
    """Returns how many values a histogram counts, zeros, Inf and NaN included."""
    return sum(found["counts"]) + sum(
        found[name] for name in ("zeros", "below", "above", "infs", "nans")
    )


def _summary(
    rows: list[dict[str, Any]], name: str, kind: str, scales: dict[int, float]
) -> dict[str, Any]:
    is_scaled = kind == "cotangents" or BACKWARD in name
    counts, num_values, num_zeros = np.zeros(EXPONENTS.size), 0, 0
    for row in rows:
        found = row["operations"].get(name, {}).get(kind)
        if found:
            counts += shifted(found["counts"], -scale_exponent(row, scales) * is_scaled)
            num_values += num_values_of(found)
            num_zeros += found["zeros"]
    shares = counts / max(num_values, 1)
    summary = {
        "operation": name,
        "kind": kind,
        "zero": num_zeros / max(num_values, 1),
        "exponents": {
            str(exponent): share
            for exponent, share in zip(EXPONENTS, shares.tolist(), strict=True)
            if share
        },
        "scale": statistics.median(scale_exponent(row, scales) for row in rows),
    }
    if kind == "cotangents":
        lost = list(shares_lost(rows, name, scales))
        summary |= {"lost": lost, "first_lost": lost[0][1], "last_lost": lost[-1][1]}
    return summary


def _keys(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns every operation and kind, in the order of the operations."""
    found: dict[tuple[str, str], None] = {}
    for row in rows:
        for name, kinds in row["operations"].items():
            found |= dict.fromkeys((name, kind) for kind in kinds)
    return list(found)
