"""Plots of a comparison of ways to update weights, like Figure 2 of the paper.

"Mixed Precision Training", arXiv:1710.03740: error rates over training (2a), exponents
of weight gradients (2b); and the share of each layer's updates that float16 loses.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.plots import decorate
from experiments.harness.update_shares import SMALLEST_EXPONENT

MAX_ERROR = 1.05  # what is above is not shown
# A row of the comparison; see `experiments.speech_updates`.
Row = dict[str, Any]


def updates_figure(
    rows: Sequence[Row], *, title: str, error_title: str, shown: str, paper: float
) -> Figure:
    """Draws error rates by optimizer, gradient exponents, and lost updates by layer.

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
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(title)
    num_columns = max(2, len(optimizers))
    panels = figure.subplots(2, num_columns)
    for axes, optimizer in zip(panels[0], optimizers, strict=False):
        for row in rows:
            if row["optimizer"] == optimizer:
                color = f"C{variants.index(row['variant'])}"
                error_curve(axes, row, color)
        decorate(axes, f"{optimizer}: {error_title} (mean and range)", "epoch")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        axes.set_ylim(0, min(axes.get_ylim()[1], MAX_ERROR))
        axes.legend(frameon=False, fontsize=8)
    first = [row for row in rows if row["optimizer"] == optimizers[0]]
    exponents(panels[1, 0], first, variants, paper)
    lost = [row for row in rows if row["variant"] == shown and row["lost_by_layer"]]
    if lost:
        lost_updates(figure, panels[1, 1], lost[0])
    for axes in panels.flat:
        axes.set_visible(axes.has_data())
    return figure


def error_curve(axes: Axes, row: Row, color: str) -> None:
    """Draws the mean error over epochs, and the range over seeds.

    A seed that diverged ends where it did; the mean is of those that go on.
    """
    curves = [curve for curve in row["val_errors"] if curve]
    if not curves:
        axes.plot([], [], color=color, label=f"{row['variant']} (diverged)")
        return
    num_epochs = max(map(len, curves))
    columns = [[c[i] for c in curves if len(c) > i] for i in range(num_epochs)]
    epochs = np.arange(1, num_epochs + 1)
    ranges = [min(c) for c in columns], [max(c) for c in columns]
    means = [np.mean(c) for c in columns]
    axes.plot(epochs, means, "o-", ms=3, color=color, label=row["variant"])
    axes.fill_between(epochs, *ranges, color=color, alpha=0.15, lw=0)


def exponents(
    axes: Axes, rows: Sequence[Row], variants: Sequence[str], paper: float
) -> None:
    """Draws the histograms of weight gradients, with the share below 2**-24."""
    for row in rows:
        share = row["gradient_exponents"]
        if share:
            x = np.array([int(exponent) for exponent in share])
            axes.step(
                x + 0.5,
                list(share.values()),
                where="mid",
                color=f"C{variants.index(row['variant'])}",
                label=f"{row['variant']}: {row['small_gradients']:.1%}",
            )
    if not axes.has_data():
        return
    axes.axvline(SMALLEST_EXPONENT, color="0.3", ls="--", lw=1)
    name = rows[0]["optimizer"] if rows else ""
    decorate(axes, f"{name}: exponents of the nonzero weight gradients", "exponent")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.1%}")
    axes.legend(
        title=f"below 2^{SMALLEST_EXPONENT} (paper: about {paper:.0%})",
        frameon=False,
        fontsize=8,
        title_fontsize=8,
    )


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
        cmap="magma",
        interpolation="nearest",
        extent=(0.5, num_epochs + 0.5, len(names) - 0.5, -0.5),
    )
    title = f"{row['optimizer']}, {row['variant']}: share of updates lost"
    decorate(axes, title, "epoch")
    axes.grid(visible=False)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    figure.colorbar(image, ax=axes, format=lambda y, _: f"{y:.0%}")
