"""Plots of exponents over a run, like figure 3 of "Mixed Precision Training".

The plots show the numbers of the unscaled loss: what loss scaling multiplied by S is
divided by S, and S appears as a shift of the format's range.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness import plot_style
from experiments.harness.numerics_summary import BACKWARD, SMALLEST
from experiments.harness.plot_style import decorate, percent_text

# Exponents of float16's smallest normal and largest number.
NORMAL, LARGEST = -14, 15
REGIONS = (
    (-np.inf, SMALLEST - 0.5, plot_style.VERMILLION, "zero"),
    (SMALLEST - 0.5, NORMAL - 0.5, plot_style.ORANGE, "subnormal"),
    (LARGEST + 0.5, np.inf, plot_style.PURPLE, "overflow"),
)
Rows = Sequence[dict[str, Any]]


def numerics_figure(title: str, rows: Rows) -> Figure:
    """Draws the histograms of one run, and the share that float16 loses at each step.

    Args:
      title: title of the figure.
      rows: what `numerics_summary.summarize` returns for the run.
    """
    backward_rows = [row for row in rows if _is_backward(row)]
    key = 0.16 * len(backward_rows) + 0.7  # inches that the longest list needs
    figure = plot_style.new_figure(max(9.0, 4 * key), title)
    *histograms, lost = figure.subplots(4, 1)
    values, cotangents, backward = histograms
    for axes in (cotangents, backward):
        axes.sharex(values)
    styles = _styles(rows)
    kinds = {
        values: [r for r in rows if r["kind"] == "values" and not _is_backward(r)],
        cotangents: [row for row in rows if row["kind"] == "cotangents"],
        backward: [row for row in backward_rows if row["kind"] == "values"],
    }
    limits = _limits(rows)
    for axes, own in kinds.items():
        _draw_histograms(axes, own, styles, limits, is_scaled=axes is not values)
    decorate(values, "outputs of matmuls and convolutions", None, "share of numbers")
    text = "gradients with respect to them, unscaled"
    decorate(cotangents, text, None, "share of numbers")
    text = "results of backward matmuls, unscaled (#2: the second of a layer)"
    decorate(backward, text, "exponent", "share of numbers")
    plot_style.exponent_axis(backward.xaxis)
    for axes in (values, cotangents):
        axes.tick_params(labelbottom=False)
    for row in kinds[cotangents]:
        style = styles[row["operation"]] | {"label": styles["", row["operation"]]}
        lost.plot(*zip(*row["lost"], strict=True), marker="o", ms=3, **style)
    text = "gradients that are zero in float16 without loss scaling"
    decorate(lost, text, "step", "share of the nonzero ones")
    plot_style.count_axis(lost.xaxis)
    lost.set_ylim(0, max(lost.get_ylim()[1], 0.01))
    plot_style.percent_axis(lost.yaxis)
    plot_style.label_ends(lost)
    return figure


def _draw_histograms(
    axes: Axes,
    rows: Rows,
    styles: dict[Any, Any],
    limits: tuple[float, float],
    *,
    is_scaled: bool,
) -> None:
    """Draws the share of each exponent, a line per operation, over float16's range."""
    for row in rows:
        name = row["operation"]
        exponents = np.arange(np.ceil(limits[0]), limits[1])
        found = {int(key): share for key, share in row["exponents"].items()}
        shares = [found.get(int(exponent), np.nan) for exponent in exponents]
        label = f"{styles['', name]}: {percent_text(row['zero'])} exactly 0"
        style = styles[name] | {"label": label}
        axes.plot(exponents, shares, drawstyle="steps-mid", **style)
    for start, stop, color, text in REGIONS:
        start, stop = max(start, limits[0]), min(stop, limits[1])
        axes.axvspan(start, stop, color=color, alpha=0.12, lw=0)
        axes.annotate(
            text,
            ((start + stop) / 2, 1),
            (0, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=plot_style.SMALL,
            color=plot_style.text_color(color),
        )
    scale = max((row["scale"] for row in rows), default=0) if is_scaled else 0
    if scale:
        label = f"zero with a scale of {plot_style.power(scale)}"
        edge = SMALLEST - 0.5 - scale
        axes.axvline(edge, color=plot_style.VERMILLION, ls="--", lw=1, label=label)
    axes.set_xlim(*limits)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 10)  # room for the names of the regions
    plot_style.key_beside(axes)


def _limits(rows: Rows) -> tuple[float, float]:
    """Returns the ends of the exponents' axis: float16's range, and what was found."""
    found = [int(exponent) for row in rows for exponent in row["exponents"]]
    edges = [SMALLEST - row["scale"] for row in rows]
    ends = [SMALLEST - 6, LARGEST + 6, *found, *edges]
    return min(ends) - 1.5, max(ends) + 1.5


def _styles(rows: Rows) -> dict[Any, Any]:
    """Returns keywords of `Axes.plot` by operation, and at ("", name) its short name.

    An operation has the same colour forward and backward; a second one has dashes.
    Where there are more operations than colours, dashes tell them apart as well.
    """
    names = list(dict.fromkeys(row["operation"] for row in rows))
    forward = list(dict.fromkeys(_forward(name) for name in names))
    short = _short_names(forward)
    cycle, styles = plot_style.CYCLE, {}
    for name in names:
        place = forward.index(_forward(name))
        number = name.partition(BACKWARD)[2]
        dashes = place // len(cycle) + bool(number)
        styles[name] = {
            "color": cycle[place % len(cycle)],
            "ls": plot_style.DASHES[dashes % len(plot_style.DASHES)],
            "lw": 1.2 + 1.6 * (len(forward) - 1 - place) / max(len(forward) - 1, 1),
        }
        styles["", name] = f"{short[_forward(name)]} {number}".strip()
    return styles


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Returns the names without the parts at either end that all have.

    >>> _short_names(["MLP/Dense_0/dot_general", "MLP/Dense_1/dot_general"])
    {'MLP/Dense_0/dot_general': 'Dense_0', 'MLP/Dense_1/dot_general': 'Dense_1'}
    """
    parts = [name.split("/") for name in names]
    start = _num_equal(parts)
    end = _num_equal([part[start:][::-1] for part in parts])
    middle = ["/".join(part[start : len(part) - end]) for part in parts]
    return {name: text or name for name, text in zip(names, middle, strict=True)}


def _num_equal(parts: list[list[str]]) -> int:
    """Returns how many parts all begin with."""
    columns = zip(*parts, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda c: len(set(c)) == 1, columns))


def _forward(name: str) -> str:
    return name.partition(BACKWARD)[0]


def _is_backward(row: dict[str, Any]) -> bool:
    return BACKWARD in row["operation"]
