"""Plots of training runs: one figure, a colour per run, the differences beneath."""

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness import plot_style
from experiments.harness.experiment import Metric
from experiments.harness.plot_style import decorate

MAX_MARKERS = 25
REFERENCE = "float32"
Rows = list[dict[str, Any]]


def training_figure(
    title: str, runs: dict[str, list[dict[str, Any]]], headline: Metric
) -> Figure:
    """Draws loss, headline metric, loss scale and step time of several runs.

    Beneath loss and metric stand their differences to the run in float32, or else to
    the first, as precisions that agree lie on each other above.

    Args:
      title: title of the figure.
      runs: name of a run → its rows of metrics (see `Recorder`).
      headline: the metric to draw beside the loss.
    """
    names = sorted(runs, key=lambda name: name != REFERENCE)
    runs = {name: runs[name] for name in names}
    has_differences = len(runs) > 1
    figure = plot_style.new_figure(7.6 if has_differences else 5.4, title)
    mosaic: list[Any] = [["loss", "metric"], ["loss-", "metric-"], ["scale", "time"]]
    heights = [3.0, 2.0, 2.4]
    if not has_differences:
        del mosaic[1], heights[1]
    panels = figure.subplot_mosaic(mosaic, height_ratios=heights)
    steps = [panels[name] for row in mosaic for name in row if name != "time"]
    for axes in steps[1:]:
        axes.sharex(steps[0])
    styles = plot_style.line_styles(names)
    _draw_curves(panels, runs, styles, headline)
    if has_differences:
        _draw_differences(panels, runs, styles, headline)
    _bars(panels["time"], runs, styles)
    plot_style.count_axis(panels["scale"].xaxis)
    labelled = [panels["loss"], panels["metric"], panels["scale"]]
    plot_style.label_ends(*labelled)
    return figure


def _draw_curves(
    panels: dict[str, Axes],
    runs: dict[str, Rows],
    styles: dict[str, dict[str, Any]],
    headline: Metric,
) -> None:
    loss, metric, scale = panels["loss"], panels["metric"], panels["scale"]
    for name, rows in runs.items():
        style = styles[name]
        train, epochs = _of_kind(rows, "train"), _of_kind(rows, "epoch")
        dots = _dots(epochs, style)
        loss.plot(*_points(train, "loss"), **plot_style.faint(style))
        loss.plot(*_points(epochs, "val_loss"), **dots)
        metric.plot(*_points(epochs, f"val_{headline.name}"), **dots)
        scale.plot(*_points(train, "loss_scale"), drawstyle="steps-post", **style)
        skips = [row for row in train if not row["grads_finite"]]
        crosses = {"color": style["color"], "ms": 7, "zorder": 9, "label": "_"}
        scale.plot(*_points(skips, "loss_scale"), "x", **crosses)
    plot_style.log_axis(loss.yaxis)
    plot_style.log2_axis(scale.yaxis)
    if "%" in headline.format:
        plot_style.percent_axis(metric.yaxis)
    else:
        plot_style.number_axis(metric.yaxis)
    direction = "" if headline.is_larger_better else " (smaller is better)"
    xlabel = None if "loss-" in panels else "step"
    text = "validation loss (faint: training)"
    decorate(loss, text, xlabel, "loss")
    text = f"validation {headline.title}{direction}"
    decorate(metric, text, xlabel, headline.title)
    decorate(scale, "loss scale (crosses: skipped steps)", "step", "loss scale")
    for axes in (loss, metric):
        axes.tick_params(labelbottom=xlabel is not None)


def _draw_differences(
    panels: dict[str, Axes],
    runs: dict[str, Rows],
    styles: dict[str, dict[str, Any]],
    headline: Metric,
) -> None:
    reference = next(iter(runs))
    is_percent = "%" in headline.format
    for panel, key in (("loss-", "val_loss"), ("metric-", f"val_{headline.name}")):
        axes, in_points = panels[panel], is_percent and panel == "metric-"
        subtract = _subtractor(runs[reference], key)
        for name, rows in runs.items():
            epochs = _of_kind(rows, "epoch")
            style = _dots(epochs, styles[name])
            axes.plot(*subtract(epochs), **style)
        unit = "points" if in_points else "difference"
        decorate(axes, f"minus {reference}'s", "step", unit)
        plot_style.number_axis(axes.yaxis, 100 if in_points else 1, signed=True)


def _subtractor(reference: Rows, key: str) -> Callable[[Rows], tuple[list, list]]:
    """Returns a function from rows to steps and differences to the reference."""
    expected = dict(zip(*_points(_of_kind(reference, "epoch"), key), strict=True))

    def subtract(rows: Rows) -> tuple[list, list]:
        steps, values = _points(rows, key)
        pairs = zip(steps, values, strict=True)
        found = [(step, y - expected[step]) for step, y in pairs if step in expected]
        return [step for step, _ in found], [difference for _, difference in found]

    return subtract


def _dots(rows: Rows, style: dict[str, Any]) -> dict[str, Any]:
    every = max(1, len(rows) // MAX_MARKERS)
    return plot_style.dots(style) | {"markevery": every}


def _of_kind(rows: Rows, kind: str) -> Rows:
    return [row for row in rows if row["kind"] == kind]


def _points(rows: Rows, name: str) -> tuple[list, list]:
    """Returns steps and values of the rows that have a value."""
    found = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in found], [row[name] for row in found]


def _bars(axes: Axes, runs: dict[str, Rows], styles: dict[str, dict[str, Any]]) -> None:
    for name, rows in runs.items():
        times = sorted(row["ms_per_step"] for row in _of_kind(rows, "epoch"))
        if times:
            median = times[len(times) // 2]
            bars = axes.barh(name, median, color=styles[name]["color"], height=0.6)
            axes.bar_label(bars, fmt=_format_ms, padding=3, fontsize=plot_style.SMALL)
    axes.set_visible(axes.has_data())
    axes.set_ylim(max(len(runs), 1) - 0.4, -0.6)
    axes.margins(x=0.2)
    decorate(axes, "median time of a step, without compilation", "ms", None)


def _format_ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
