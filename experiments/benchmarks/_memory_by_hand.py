"""Memory and traffic of autocast's train step beside mixed precision by hand."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks._train_steps import make_step, measure_cost
from experiments.benchmarks.workloads import Workload
from experiments.harness import plot_style
from experiments.harness.plot_style import decorate
from experiments.harness.results import Column

NAME = "memory_real"
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}
# By name of a row, the name of the one by hand that it is compared with.
BASELINES = {
    "float32": "float32",
    **{
        name: f"by hand, {dtype}"
        for dtype in DTYPES
        for name in (f"by hand, {dtype}", f"mixed_{dtype}")
    },
}
COLUMNS = (
    Column("workload", "workload"),
    Column("batch", "batch_size", "{:,}"),
    Column("step", "name"),
    Column("temporaries, MB", "temporaries_mb", "{:,.1f}"),
    Column("to float32", "temporaries_ratio", "{:.3f}"),
    Column("to by hand", "temporaries_to_by_hand", "{:.3f}"),
    Column("moved, MB", "moved_mb", "{:,.0f}"),
    Column("to float32 ", "moved_ratio", "{:.3f}"),
    Column("to by hand ", "moved_to_by_hand", "{:.3f}"),
    Column("peak, MB", "peak_mb", "{:,.1f}"),
    Column("roofline, ms", "roofline_ms", "{:.3g}"),
    Column("bound by", "bound"),
)


def measure(
    name: str,
    workload: Workload,
    device: str | None,
    steps: tuple[str, ...] = tuple(BASELINES),
) -> list[dict[str, Any]]:
    """Compiles the steps of one model: float32, and half by hand and by autocast.

    All have float32 parameters, AdamW and dynamic loss scaling.

    Args:
      name: name of the model in the table.
      workload: the model, with `by_hand`; it has its batch size on a GPU.
      device: as `mpjax.cost.analyze` takes it; None for the one of this machine.
      steps: names of the rows, in an order in which each follows its baseline.

    Returns:
      A row of the table per step; see COLUMNS. A ratio to a step that was not
      measured is None, as is the one of float32 to what is by hand.
    """
    batch_size = workload.batch_sizes["gpu"]
    runs: dict[str, dict[str, Any]] = {}
    for step_name in steps:
        step, state = make_step_by_name(workload, step_name)
        run = {"workload": name, "batch_size": batch_size, "name": step_name}
        run |= measure_cost(workload, step, state, batch_size, device)
        runs[step_name] = run
        baseline = BASELINES[step_name]
        for key in ("temporaries", "moved"):
            own = run[f"{key}_mb"]
            run[f"{key}_ratio"] = _ratio(own, runs.get("float32"), f"{key}_mb")
            by_hand = None if baseline == "float32" else runs.get(baseline)
            run[f"{key}_to_by_hand"] = _ratio(own, by_hand, f"{key}_mb")
    return list(runs.values())


def draw(table: dict[str, Any]) -> Figure:
    """Draws temporaries and traffic per model, as multiples of those by hand.

    Args:
      table: what the result file holds.
    """
    runs = table["runs"]
    workloads = list(dict.fromkeys(run["workload"] for run in runs))
    title = "Memory of autocast's step beside that of half written by hand, compiled "
    figure = plot_style.new_figure(
        0.42 * len(workloads) + 1.6, title + f"for {table['compiled_for']}"
    )
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    pairs = zip(
        panels, (("temporaries", "temporaries"), ("moved", "bytes moved")), strict=True
    )
    for axes, (key, text) in pairs:
        axes.axvline(1, color=plot_style.BLACK, lw=1)
        for index, dtype in enumerate(DTYPES):
            own = [run for run in runs if run["name"] == f"mixed_{dtype}"]
            ratios = {run["workload"]: run[f"{key}_to_by_hand"] for run in own}
            _lollipops(axes, [ratios.get(name) for name in workloads], index, dtype)
        decorate(axes, text, "times those by hand (less is better)", None)
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(range(len(workloads)), workloads)
    panels[0].set_ylim(len(workloads) - 0.5, -0.5)
    panels[0].margins(x=0.25)  # room for the numbers
    plot_style.key_below(figure, *panels[0].get_legend_handles_labels())
    return figure


def _lollipops(axes: Axes, ratios: list[float | None], index: int, dtype: str) -> None:
    """Draws a format's ratios, which are None where one has no value."""
    color = plot_style.COLORS[f"mixed_{dtype}"]
    known = [(r, i + 0.36 * (index - 0.5)) for i, r in enumerate(ratios) if r]
    axes.hlines([y for _, y in known], 1, [x for x, _ in known], color=color, lw=2)
    axes.plot(*zip(*known, strict=True), "o", ms=5, color=color, label=dtype)
    for x, y in known:
        is_left = round(x, 2) < 1
        axes.annotate(
            f"{x:.2f}",
            (x, y),
            (-5 if is_left else 5, 0),
            textcoords="offset points",
            ha="right" if is_left else "left",
            va="center",
            fontsize=plot_style.SMALL,
            color=plot_style.text_color(color),
        )


def make_step_by_name(workload: Workload, name: str) -> tuple[Any, Any]:
    """Returns the train step of a row, and its state's shapes and dtypes."""
    if name == "float32":
        return make_step(workload, "float32", autocast=False)
    by_hand, _, dtype = name.partition(", ")
    if by_hand != "by hand":
        return make_step(workload, name)
    assert workload.by_hand is not None
    loss_fn = workload.by_hand(DTYPES[dtype])
    half = dataclasses.replace(workload, loss_fn=loss_fn)
    return make_step(half, "float32", autocast=False)


def _ratio(own: float, run: dict[str, Any] | None, key: str) -> float | None:
    return own / run[key] if run and run[key] else None
