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
    styles = plot_style.line_styles([_variant(scale) for scale in scales])
    for index, (scale, style) in enumerate(zip(scales, styles.values(), strict=True)):
        shares = [row["lost"][index] for row in table["over_steps"]]
        lost.plot(steps, shares, **style | {"label": _text(scale)})
    decorate(lost, "flushed to zero in float16, of the nonzero", "step", "share")
    plot_style.count_axis(lost.xaxis)
    lost.set_ylim(0, max(lost.get_ylim()[1], 1e-4))
    plot_style.percent_axis(lost.yaxis)
    plot_style.label_ends(lost)
    return figure


def _draw_histogram(axes: Axes, table: dict[str, Any]) -> None:
    shares = {int(key): share for key, share in table["exponents"].items()}
    found = [*shares, *(e for first, last, _ in PAPER_SHARES for e in (first, last))]
    low = min(*found, math.floor(_edge(table["advised_scale"])))
    places = list(shares)
    color = plot_style.GREY
    axes.bar(places, list(shares.values()), width=0.9, color=color, label="this run")
    zero = low - _ZERO_GAP
    axes.bar([zero], [table["zero"]], width=1.8, color=color)
    paper: dict[str, Any] = {"color": plot_style.BLUE, "lw": 2.5}
    axes.hlines(PAPER_ZERO, zero - 0.9, zero + 0.9, label="the paper's SSD", **paper)
    for first, last, share in PAPER_SHARES:
        # A share of several exponents is spread evenly.
        each = share / (last - first + 1)
        axes.hlines(each, first - 0.45, last + 0.45, **paper)
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
    decorate(axes, text, "magnitude", "share of all values, per power of two")
    axes.grid(visible=False, axis="x")
    plot_style.key_beside(axes)


def _draw_edges(axes: Axes, advised: float) -> None:
    """Draws where float16 begins, at three loss scales."""
    for scale, dashes in {1.0: "-", float(PAPER_SCALE): "--", advised: ":"}.items():
        label = "zero below, " if scale == 1 else "at "
        label += _text(scale) + ", advised" * (scale == advised)
        color = plot_style.COLORS[_variant(scale)]
        axes.axvline(_edge(scale), color=color, ls=dashes, lw=1.2, label=label)


def _edge(loss_scale: float) -> float:
    """Returns the place below which float16 has zero, in exponents."""
    return SMALLEST - 0.5 - math.log2(loss_scale)


def _variant(loss_scale: float) -> str:
    """Returns the loss scale's name in `COLORS`; others are those of histograms."""
    name = "unscaled" if loss_scale == 1 else f"scale_{loss_scale:g}"
    return name if name in plot_style.COLORS else "histogram"


def _text(loss_scale: float) -> str:
    """Returns a loss scale in words, a large one as a power of two."""
    if loss_scale == 1:
        return "unscaled"
    if loss_scale < 2**14:
        return f"scale {loss_scale:g}"
    return f"scale 2^{math.log2(loss_scale):g}"
