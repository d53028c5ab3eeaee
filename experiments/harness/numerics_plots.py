"""Plots of exponents over a run, like figure 3 of "Mixed Precision Training".

The plots show the numbers of the unscaled loss: what loss scaling multiplied by S is
divided by S, and S appears as a shift of the format's range.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.files import atomic_write
from experiments.harness.numerics import HI, LO
from experiments.harness.plots import DPI, decorate

BACKWARD = " (backward)"
# Exponents of float16's smallest subnormal, smallest normal and largest number.
SMALLEST, NORMAL, LARGEST = -24, -14, 15
EXPONENTS = np.arange(LO, HI + 1)


def numerics_figure(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Draws the histograms of one run, and the share that float16 loses at each step.

    Args:
      path: the PNG to write.
      title: title of the figure.
      rows: the run's rows of metrics; rows of kind "numerics" hold the histograms.
    """
    scales = {r["step"]: r["loss_scale"] for r in rows if r["kind"] == "train"}
    counted = [row for row in rows if row["kind"] == "numerics"]
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    (values, cotangents), (weights, lost) = figure.subplots(2, 2)
    _histograms(values, counted, "values", is_backward=False)
    _histograms(cotangents, counted, "cotangents", scales=scales, is_backward=False)
    _histograms(weights, counted, "values", scales=scales, is_backward=True)
    for name, slot in _names(counted):
        if slot == "cotangents":
            steps, shares = zip(*shares_lost(counted, name, scales), strict=True)
            lost.plot(
                steps, shares, "o-", ms=3, label=name, color=_color(counted, name)
            )
    decorate(values, "outputs of matmuls and convolutions", "exponent")
    decorate(cotangents, "gradients with respect to them", "exponent")
    decorate(weights, "results of backward matmuls (#2: second of a layer)", "exponent")
    decorate(
        lost, "share of the gradients below float16's smallest number, unscaled", "step"
    )
    lost.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    for axes in (values, cotangents, weights, lost):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, framealpha=0.6)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")


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
            counts = _shifted(found["counts"], -_shift(row, scales))
            nonzero = counts.sum() + found["below"] + found["above"]
            below = counts[EXPONENTS < SMALLEST].sum() + found["below"]
            yield row["step"], below / max(nonzero, 1)


def _histograms(
    axes: Axes,
    rows: list[dict[str, Any]],
    slot: str,
    *,
    is_backward: bool,
    scales: dict[int, float] | None = None,
) -> None:
    """Draws the share of each exponent, a line per operation, over float16's range."""
    shown = []
    for name, found_slot in _names(rows):
        if found_slot != slot or (BACKWARD in name) != is_backward:
            continue
        counts, num_values, num_zeros = np.zeros(EXPONENTS.size), 0, 0
        for row in rows:
            found = row["operations"].get(name, {}).get(slot)
            if found:
                shift = _shift(row, scales)
                counts += _shifted(found["counts"], -shift)
                num_values += _num_values(found)
                num_zeros += found["zeros"]
        shown += [EXPONENTS[counts > 0]]
        share = np.where(counts > 0, counts, np.nan) / max(num_values, 1)
        axes.plot(
            EXPONENTS,
            share,
            drawstyle="steps-mid",
            ls="--" if name.endswith("#2") else "-",
            lw=1.2,
            color=_color(rows, name),
            label=f"{name}: {num_zeros / max(num_values, 1):.0%} zero",
        )
    found = np.concatenate([np.array([SMALLEST - 4, LARGEST + 4]), *shown])
    low, high = found.min() - 1, found.max() + 1
    regions = (
        (low, SMALLEST - 0.5, "C3", "zero in float16"),
        (SMALLEST - 0.5, NORMAL - 0.5, "C1", "subnormal in float16"),
        (LARGEST + 0.5, high, "C4", "overflow in float16"),
    )
    for start, stop, color, label in regions:
        axes.axvspan(start, stop, color=color, alpha=0.12, lw=0, label=label)
    used = [_shift(row, scales) for row in rows]
    if any(used):
        edge = SMALLEST - 0.5 - float(np.median(used))
        axes.axvline(edge, color="C3", ls="--", lw=1, label="zero at the loss scale")
    axes.set_xlim(low, high)
    axes.set_yscale("log")
    axes.set_ylabel("share of all numbers")


def _names(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns every operation and slot, in the order of the operations."""
    found: dict[tuple[str, str], None] = {}
    for row in rows:
        for name, slots in row["operations"].items():
            found |= dict.fromkeys((name, slot) for slot in slots)
    return list(found)


def _color(rows: list[dict[str, Any]], name: str) -> str:
    """Returns the colour of an operation, the same forward and backward."""
    forward = dict.fromkeys(name.split(BACKWARD)[0] for name, _ in _names(rows))
    return f"C{list(forward).index(name.split(BACKWARD)[0]) % 10}"


def _shift(row: dict[str, Any], scales: dict[int, float] | None) -> int:
    if scales is None:
        return 0
    return round(math.log2(scales.get(row["step"], 1.0) or 1.0))


def _shifted(counts: list[int], shift: int) -> np.ndarray:
    """Shifts counts to other exponents; drops those that leave the range."""
    moved = np.zeros(len(counts))
    source = np.asarray(counts)
    if shift >= 0:
        moved[shift:] = source[: source.size - shift]
    else:
        moved[:shift] = source[-shift:]
    return moved


def _num_values(found: dict[str, Any]) -> int:
    return sum(found["counts"]) + sum(
        found[name] for name in ("zeros", "below", "above", "infs", "nans")
    )
