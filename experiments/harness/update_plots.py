"""Plots of a comparison of ways to update weights, like Figure 2 of the paper.

"Mixed Precision Training", arXiv:1710.03740: error rates over training (2a), exponents
of weight gradients (2b); and the share of each layer's updates that float16 loses.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness import plot_style
from experiments.harness.plot_style import decorate
from experiments.harness.update_shares import SMALLEST_EXPONENT

MAX_ERROR = 1.05  # what is above is not shown
REFERENCE = "float32"
# A row of the comparison; see `experiments.speech_updates`.
Row = dict[str, Any]


def updates_figure(
    rows: Sequence[Row], *, title: str, error_title: str, shown: str, paper: float
) -> Figure:
    """Draws error rates by optimizer, gradient exponents, and lost updates by layer.

    Beneath the error rates stand their differences to float32, seed by seed.

    Args:
      rows: each with `optimizer`, `variant`, `val_errors` (a list of numbers per seed),
        `gradient_exponents` (exponent → share of the nonzero gradients),
        `small_gradients` and `lost_by_layer` (parameter → share per epoch).
      title: title of the figure.
      error_title: what `val_errors` are.
      shown: the variant whose lost updates are shown, where a row has it.
      paper: the paper's share of gradients below 2**-24.
    """
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    lost = [row for row in rows if row["variant"] == shown and row["lost_by_layer"]]
    num_seeds = max(len(row["val_errors"]) for row in rows)
    seeds = f"mean and range of {num_seeds} seeds" if num_seeds > 1 else "one seed"
    height = 11.0 if len(optimizers) > 1 else 8.6
    figure = plot_style.new_figure(height, f"{title} ({seeds})")
    panels = _make_panels(figure, optimizers)
    styles = plot_style.line_styles(list(dict.fromkeys(r["variant"] for r in rows)))
    xlabel = "epoch" if len(optimizers) == 1 else None
    for optimizer in optimizers:
        own = [row for row in rows if row["optimizer"] == optimizer]
        errors, differences = panels[optimizer], panels[f"{optimizer}-"]
        error_curves(errors, own, styles)
        difference_curves(differences, own, styles)
        decorate(errors, f"{optimizer}: {error_title}", xlabel, error_title)
        text = f"minus {REFERENCE}'s, seed by seed"
        errors.tick_params(labelbottom=xlabel is not None)
        decorate(differences, text, "epoch", "points")
    exponents(panels["exponents"], rows, optimizers[0], styles, paper)
    if lost:
        lost_updates(figure, panels["lost"], lost[0])
    for axes in panels.values():
        axes.set_visible(axes.has_data())
    plot_style.label_ends(
        *(p for n, p in panels.items() if n not in ("exponents", "lost"))
    )
    return figure


def _make_panels(figure: Figure, optimizers: Sequence[str]) -> dict[str, Axes]:
    """Returns axes by name: those over epochs share them.

    An optimizer's differences are beneath its errors, or beside, if it is the only one.
    """
    errors = [[f"{name}{end}" for name in optimizers] for end in ("", "-")]
    if len(optimizers) == 1:
        errors = [[*errors[0], *errors[1]]]
    heights = (2.6 * len(errors), 2.4, 3.6)
    parts: Any = figure.subfigures(3, 1, height_ratios=heights)
    first, second, third = parts
    panels = first.subplot_mosaic(errors, sharex=True)
    panels |= {"exponents": second.subplots(), "lost": third.subplots()}
    return panels


def error_curves(axes: Axes, rows: Sequence[Row], styles: dict[str, Any]) -> None:
    """Draws the mean error over epochs, and the range over seeds.

    A seed that diverged ends where it did; the mean is of those that go on.
    """
    for row in rows:
        curves = [curve for curve in row["val_errors"] if curve]
        _mean_and_range(axes, curves, styles[row["variant"]], shift=0.0)
    axes.set_ylim(0, min(axes.get_ylim()[1], MAX_ERROR))
    plot_style.percent_axis(axes.yaxis)


def difference_curves(axes: Axes, rows: Sequence[Row], styles: dict[str, Any]) -> None:
    """Draws how far each variant is from float32, seed by seed, beside each other."""
    expected = next((r["val_errors"] for r in rows if r["variant"] == REFERENCE), [])
    for place, row in enumerate(rows):
        curves = [
            [a - b for a, b in zip(curve, reference, strict=False)]
            for curve, reference in zip(row["val_errors"], expected, strict=False)
        ]
        curves = [curve for curve in curves if curve]
        style = styles[row["variant"]] | {"lw": 1.2}
        if not curves:
            style["label"] = f"{row['variant']} (diverged)"
        shift = 0.06 * (place - (len(rows) - 1) / 2)
        _mean_and_range(axes, curves, style, shift=shift, has_bars=True)
    plot_style.count_axis(axes.xaxis)
    plot_style.number_axis(axes.yaxis, 100, signed=True)


def _mean_and_range(
    axes: Axes,
    curves: Sequence[Sequence[float]],
    style: dict[str, Any],
    *,
    shift: float,
    has_bars: bool = False,
) -> None:
    """Draws a mean over seeds, and the range as a band, or as bars beside others'."""
    num_epochs = max(map(len, curves), default=0)
    columns = [[c[i] for c in curves if len(c) > i] for i in range(num_epochs)]
    epochs = np.arange(1, num_epochs + 1) + shift
    means = np.array([np.mean(column) for column in columns])
    low, high = (np.array([pick(c) for c in columns]) for pick in (min, max))
    axes.plot(epochs, means, **plot_style.dots(style))
    if has_bars and num_epochs:
        spread = [means - low, high - means]
        line = {"color": style["color"], "lw": 1, "zorder": style["zorder"]}
        axes.errorbar(epochs, means, spread, fmt="none", capsize=0, label="_", **line)
    elif num_epochs:
        axes.fill_between(epochs, low, high, color=style["color"], alpha=0.1, lw=0)


def exponents(
    axes: Axes,
    rows: Sequence[Row],
    optimizer: str,
    styles: dict[str, Any],
    paper: float,
) -> None:
    """Draws the histograms of weight gradients, with the share below 2**-24."""
    rows = [r for r in rows if r["optimizer"] == optimizer and r["gradient_exponents"]]
    for row in rows:
        share = row["gradient_exponents"]
        x = np.array([int(exponent) for exponent in share]) + 0.5
        axes.step(x, list(share.values()), where="mid", **styles[row["variant"]])
    if not rows:
        return
    axes.set_yscale("log")
    axes.axvline(SMALLEST_EXPONENT, color="0.3", ls="--", lw=1)
    small = [row["small_gradients"] for row in rows]
    edge = plot_style.power(SMALLEST_EXPONENT)
    text = f"below {edge}: at most {plot_style.percent_text(max(small))}"
    text += f"\n(paper: about {100 * paper:.0f} %)"
    place = {"transform": axes.transAxes, "va": "top", "linespacing": 1.4}
    axes.text(0.02, 0.96, text, fontsize=plot_style.SMALL, **place)
    title = f"{optimizer}: exponents of the nonzero weight gradients"
    decorate(axes, title, "exponent", "share")
    plot_style.exponent_axis(axes.xaxis)


def lost_updates(figure: Figure, axes: Axes, row: Row) -> None:
    """Draws a heat map of the share of updates lost, parameters by epochs."""
    names = list(row["lost_by_layer"])
    values = np.array([row["lost_by_layer"][name] for name in names], float)
    num_epochs = values.shape[1]
    image = axes.imshow(
        values,
        aspect="auto",
        vmin=0,
        vmax=1,
        cmap="cividis",
        interpolation="nearest",
        extent=(0.5, num_epochs + 0.5, len(names) - 0.5, -0.5),
    )
    title = f"{row['optimizer']}, {row['variant']}: updates lost"
    decorate(axes, title, "epoch", None)
    plot_style.count_axis(axes.xaxis)
    axes.grid(visible=False)
    axes.set_yticks(range(len(names)), names, fontsize=plot_style.SMALL - 1)
    bar = figure.colorbar(image, ax=axes)
    plot_style.percent_axis(bar.ax.yaxis)
    bar.ax.tick_params(labelsize=plot_style.SMALL)
