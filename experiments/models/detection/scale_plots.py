"""Plots of a comparison of loss scales on a detector."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness import plot_style
from experiments.harness.plot_style import decorate

REFERENCE = "float32"
# A row of the comparison; see `experiments.ssd_scales_table`.
Row = dict[str, Any]


def scales_figure(title: str, rows: Sequence[Row]) -> Figure:
    """Draws precisions over epochs, their last differences to float32, and zeros.

    Args:
      title: title of the figure.
      rows: each with `variant`, and, where it was trained here, `test_map07s` and
        `val_map07s` by seed, `difference_interval` in points, and `zero_gradients`.
    """
    rows = [row for row in rows if row.get("val_map07s") is not None]
    num_seeds = max(len(row["val_map07s"]) for row in rows)
    seeds = f"{num_seeds} seeds" if num_seeds > 1 else "one seed"
    figure = plot_style.new_figure(7.2, f"{title} ({seeds})")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 3))
    curves = parts[0].subplots()
    differences, zeros = parts[1].subplots(1, 2, sharey=True)
    styles = plot_style.line_styles([row["variant"] for row in rows])
    for row in rows:
        _draw_curve(curves, row["val_map07s"], styles[row["variant"]])
    text = "validation mAP (VOC07): mean over seeds (faint: each seed)"
    decorate(curves, text, "epoch", "mAP")
    plot_style.count_axis(curves.xaxis)
    plot_style.percent_axis(curves.yaxis)
    names = [row["variant"] for row in rows]
    for place, row in enumerate(rows):
        color = styles[row["variant"]]["color"]
        _draw_difference(differences, place, row, color)
        if row["zero_gradients"] is not None:
            zeros.plot([row["zero_gradients"]], [place], "o", color=color)
    differences.axvline(0, color=plot_style.BLACK, lw=1)
    decorate(differences, "test mAP minus float32's, 95 %", "points", None)
    decorate(zeros, "activation gradients that are zero", "share of all", None)
    differences.set_yticks(range(len(names)), names)
    differences.set_ylim(len(names) - 0.5, -0.5)
    plot_style.number_axis(differences.xaxis, signed=True)
    plot_style.percent_axis(zeros.xaxis)
    zeros.locator_params(axis="x", nbins=5)
    zeros.margins(x=0.2)
    plot_style.label_ends(curves)
    return figure


def _draw_curve(axes: Axes, curves: Sequence[Sequence[float]], style: Any) -> None:
    """Draws the mean over seeds, and each; one that diverged ends where it did."""
    for curve in curves:
        axes.plot(np.arange(1, len(curve) + 1), curve, **plot_style.faint(style))
    num_epochs = max(map(len, curves), default=0)
    means = [
        np.mean([curve[i] for curve in curves if len(curve) > i])
        for i in range(num_epochs)
    ]
    axes.plot(np.arange(1, num_epochs + 1), means, **plot_style.dots(style))


def _draw_difference(axes: Axes, place: int, row: Row, color: str) -> None:
    """Draws the mean difference with its interval, or says that there is none."""
    interval = row["difference_interval"]
    if interval is None:
        is_diverged = row["num_diverged"] == row["num_seeds"]
        if is_diverged:
            axes.annotate(
                "diverged", (0, place), (4, 0), textcoords="offset points", va="center",
                fontsize=plot_style.SMALL, color=plot_style.text_color(color),
            )  # fmt: skip
        return
    # A file has null for the ends of one seed's interval.
    mean, low, high = (np.nan if x is None else x for x in interval)
    axes.plot([mean], [place], "o", color=color)
    axes.plot([low, high], [place, place], color=color, lw=2)
