"""Plots of training runs: one figure, a colour per run."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from experiments.harness.experiment import Metric
from experiments.harness.files import atomic_write

DPI = 130
MAX_MARKERS = 25


def training_figure(
    path: Path, title: str, runs: dict[str, list[dict[str, Any]]], headline: Metric
) -> None:
    """Draws loss, headline metric, loss scale and step time of several runs.

    It leaves pyplot and its backend alone, so that a notebook keeps its own.

    Args:
      path: the PNG to write.
      title: title of the figure.
      runs: name of a run → its rows of metrics (see `Recorder`).
      headline: the metric to draw beside the loss.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    (loss, metric), (scale, step_time) = figure.subplots(2, 2)
    for index, (name, rows) in enumerate(runs.items()):
        style = {"color": f"C{index}", "lw": 2.5 - 0.5 * min(index, 3)}
        train = [row for row in rows if row["kind"] == "train"]
        epochs = [row for row in rows if row["kind"] == "epoch"]
        every = max(1, len(epochs) // MAX_MARKERS)
        dots = {"marker": "o", "ms": 5, "markevery": every, "label": name}
        _line(loss, train, "loss", **style | {"alpha": 0.4, "lw": 1})
        _line(loss, epochs, "val_loss", **style, **dots)
        _line(metric, epochs, f"val_{headline.name}", **style, **dots)
        _line(scale, train, "loss_scale", drawstyle="steps-post", **style)
        _skips(scale, train, style["color"])
    _bars(step_time, runs)
    loss.set_yscale("log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(_PlainLogFormatter(minor_thresholds=(2, 0.6)))
    scale.set_yscale("log", base=2)
    decorate(loss, "loss (faint: training steps, dots: validation)", "step")
    direction = "" if headline.is_larger_better else " (smaller is better)"
    decorate(metric, f"validation {headline.title}{direction}", "step")
    decorate(scale, "loss scale (crosses: skipped steps)", "step")
    decorate(step_time, "median ms per step, without compilation", None)
    if metric.get_legend_handles_labels()[0]:
        corner = "lower right" if headline.is_larger_better else "upper right"
        metric.legend(loc=corner, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")


class _PlainLogFormatter(LogFormatter):
    """Writes minor labels, where there is room for them, as 0.2, not as 2 x 10^-1."""

    def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
        return f"{x:g}"


def _line(axes: Axes, rows: list[dict[str, Any]], name: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _skips(axes: Axes, rows: list[dict[str, Any]], color: str) -> None:
    skips = [(r["step"], r["loss_scale"]) for r in rows if not r["grads_finite"]]
    if skips:
        axes.plot(*zip(*skips, strict=True), "x", color=color, markersize=8)


def _bars(axes: Axes, runs: dict[str, list[dict[str, Any]]]) -> None:
    for index, (name, rows) in enumerate(runs.items()):
        times = sorted(row["ms_per_step"] for row in rows if row["kind"] == "epoch")
        if times:
            bars = axes.bar(name, times[len(times) // 2], color=f"C{index}", width=0.6)
            axes.bar_label(bars, fmt="%.3g", padding=2)
    axes.set_xlim(-0.8, len(runs) - 0.2)
    axes.margins(y=0.1)


def decorate(axes: Axes, title: str, xlabel: str | None) -> None:
    """Gives axes a title and the house look."""
    axes.set_title(title, fontsize=10)
    if xlabel:
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
