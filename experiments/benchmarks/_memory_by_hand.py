"""Memory and traffic of autocast's train step beside mixed precision by hand."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks._train_steps import make_step, measure_cost
from experiments.benchmarks.workloads import Workload
from experiments.harness.plots import decorate
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


def draw(device: str, runs: list[dict[str, Any]]) -> Figure:
    """Draws temporaries and traffic per model, as multiples of those by hand."""
    workloads = list(dict.fromkeys(run["workload"] for run in runs))
    figure = Figure(figsize=(0.9 * len(workloads) + 3, 6), layout="constrained")
    figure.suptitle(f"Autocast relative to half by hand, compiled for {device}")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, key in ((top, "temporaries"), (bottom, "moved")):
        for index, dtype in enumerate(DTYPES):
            own = [run for run in runs if run["name"] == f"mixed_{dtype}"]
            ratios = {run["workload"]: run[f"{key}_to_by_hand"] for run in own}
            _bars(axes, [ratios.get(name) for name in workloads], index, dtype)
        axes.axhline(1, color="0.5", lw=1, ls=":")
        axes.set_xticks(range(len(workloads)), workloads, rotation=30, ha="right")
    decorate(top, "temporaries", None)
    decorate(bottom, "bytes moved", None)
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _bars(axes: Axes, ratios: list[float | None], index: int, label: str) -> None:
    places = [place + 0.4 * (index - 0.5) for place in range(len(ratios))]
    heights = [ratio or 0.0 for ratio in ratios]
    axes.bar(places, heights, 0.38, color=f"C{index}", label=label)


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
