"""Activation gradients in the form of figure 3 of "Mixed Precision Training"."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness import plot_style
from experiments.harness.gradient_summary import (
    PAPER_SCALE,
    PAPER_SHARES,
    PAPER_ZERO,
)
from experiments.harness.numerics_summary import SMALLEST
from experiments.harness.plot_style import decorate, percent_text

_LARGEST = 15  # exponent of float16's largest number
_ZERO_GAP = 5  # exponents between the bar of zeros and the others


def gradients_figure(title: str, table: dict[str, Any]) -> Figure:
    """Draws the histogram of all activation gradients, and what float16 loses of them.

    Args:
      title: title of the figure.
      table: what `gradient_summary.summarize_gradients` returns.
    """
    figure = plot_style.new_figure(6.4, title)
    bars, lost = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw_histogram(bars, table)
    steps = [row["step"] for row in table["over_steps"]]
    scales = [row["loss_scale"] for row in table["runs"]]
    styles = plot_style.line_styles([f"scale {_text(scale)}" for scale in scales])
    for index, style in enumerate(styles.values()):
        shares = [row["lost"][index] for row in table["over_steps"]]
        lost.plot(steps, shares, **style)
    decorate(lost, "flushed to zero in float16, of the nonzero", "step", "share")
    plot_style.count_axis(lost.xaxis)
    lost.set_ylim(0, max(lost.get_ylim()[1], 0.01))
    plot_style.percent_axis(lost.yaxis)
    plot_style.label_ends(lost)
    return figure


def _draw_histogram(axes: Axes, table: dict[str, Any]) -> None:
    shares = {int(key): share for key, share in table["exponents"].items()}
    found = [*shares, *(e for first, last, _ in PAPER_SHARES for e in (first, last))]
    low = min(found)
    places = list(shares)
    color, paper = plot_style.BLUE, plot_style.VERMILLION
    axes.bar(places, list(shares.values()), width=0.9, color=color, label="this run")
    zero = low - _ZERO_GAP
    axes.bar([zero], [table["zero"]], width=1.8, color=color)
    axes.plot([zero], [PAPER_ZERO], "D", color=paper, ms=5, label="the paper's SSD")
    for first, last, share in PAPER_SHARES:
        # A share of several exponents is spread evenly.
        each = share / (last - first + 1)
        axes.plot([first - 0.45, last + 0.45], [each, each], color=paper, lw=2.5)
    axes.set_yscale("log")
    axes.set_ylim(axes.get_ylim()[0], 2)
    plot_style.percent_axis(axes.yaxis)
    _draw_edges(axes, table["advised_scale"])
    ticks = np.arange(math.ceil((low + 2) / 8) * 8, max(found) + 1, 8)
    labels = ["0", *(plot_style.power(int(tick)) for tick in ticks)]
    axes.set_xticks([zero, *ticks], labels)
    text = (
        f"all activation gradients, unscaled: {percent_text(table['zero'])} zero, "
        f"{percent_text(table['below'])} below {plot_style.power(SMALLEST)}"
    )
    decorate(axes, text, "magnitude", "share of all values")
    axes.grid(visible=False, axis="x")
    plot_style.key_beside(axes)


def _draw_edges(axes: Axes, advised: float) -> None:
    """Draws where float16 begins, at three loss scales."""
    edges = {
        1.0: ("zero below, unscaled", plot_style.BLACK, "-"),
        float(PAPER_SCALE): (f"at scale {PAPER_SCALE}", plot_style.GREEN, "--"),
    }
    edges.setdefault(
        advised, (f"at scale {_text(advised)}, advised", plot_style.PURPLE, ":")
    )
    for scale, (label, color, dashes) in edges.items():
        place = SMALLEST - 0.5 - math.log2(scale)
        axes.axvline(place, color=color, ls=dashes, lw=1.2, label=label)


def _text(loss_scale: float) -> str:
    """Returns a loss scale as a number, a large one as a power of two."""
    if loss_scale < 2**14:
        return f"{loss_scale:g}"
    return f"2^{math.log2(loss_scale):g}"
