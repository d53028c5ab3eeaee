"""Plots of training runs: one figure, a colour per run."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

DPI = 130


def training_figure(path: Path, title: str, runs: dict[str, list[dict[str, Any]]]):
    """Draws loss, accuracy, loss scale and step time of several runs.

    Args:
      path: the PNG to write.
      title: of the figure.
      runs: name of a run → its rows of metrics (see `Recorder`).
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    (loss, accuracy), (scale, step_time) = axes
    for index, (name, rows) in enumerate(runs.items()):
        style = {"color": f"C{index}", "label": name}
        train = [row for row in rows if row["kind"] == "train"]
        epochs = [row for row in rows if row["kind"] == "epoch"]
        _line(loss, train, "loss", alpha=0.35, **style | {"label": None})
        _line(loss, epochs, "val_loss", marker="o", **style)
        _line(accuracy, epochs, "val_accuracy", marker="o", **style)
        _line(scale, train, "loss_scale", drawstyle="steps-post", **style)
        _skips(scale, train, style["color"])
    _bars(step_time, runs)
    _decorate(loss, "loss (faint: training steps, dots: validation)", "step")
    _decorate(accuracy, "validation accuracy", "step")
    _decorate(scale, "loss scale (crosses: skipped steps)", "step")
    _decorate(step_time, "median ms per step, without compilation", None)
    loss.set_yscale("log")
    scale.set_yscale("log", base=2)
    accuracy.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


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
            axes.bar_label(bars, fmt="%.3g")


def _decorate(axes: Axes, title: str, xlabel: str | None) -> None:
    axes.set_title(title, fontsize=10)
    if xlabel:
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
