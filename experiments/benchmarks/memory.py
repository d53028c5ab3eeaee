"""Memory of a training step in mixed precision, over batch sizes.

    python -m experiments.benchmarks.memory       # 7 min on 2 cores, no GPU needed
    python -m experiments.benchmarks.memory --device a100
    python -m experiments.benchmarks.memory --workloads resnet50,gpt2
    python -m experiments.benchmarks.memory --workloads real    # over an hour
    python -m experiments.benchmarks.memory --float8 --workloads mlp,gpt2

Compiles whole training steps for a GPU that this machine need not have (`mpjax.cost`;
needs `pip install "jax[cuda13]"`, and JAX_PLATFORMS=cpu where there is no GPU) and
compares what must fit at once: parameters, optimizer state, batch and temporaries.
"Mixed Precision Training" (arXiv:1710.03740, section 3) says that training needs
roughly half of the memory, as activations outweigh the second copy of the weights. The
"checkpointed" step saves the forward pass's matmuls without batch dimensions, and
rematerializes the rest.

The models of `experiments.benchmarks.real_models` are compiled at one batch size, in
float32, by autocast, and with half written by hand on every layer; temporaries and
traffic are compared with those by hand. The table is written after each model, and the
rows of models that are not measured again stay in it.

With --float8 both kinds of models are compiled in float8 and in bfloat16, the head of a
language model in bfloat16 by a rule. The bytes that a step moves include those that are
read and written to scale and to round.

On a GPU that supports it the attention of transformers is cuDNN's kernel, in the half
steps, by autocast (through `mpjax.half_precision`) and by hand. In float32, which the
kernel refuses, it is XLA's operations, so that ratios to float32 include what the
kernel saves; --attention xla compares like with like. Each row of the result file
records its `attention`.
"""

from experiments.configs.memory import BATCH_SIZES, Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.benchmarks.memory", Config, doc=__doc__)

import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from experiments.benchmarks import _memory_by_hand as by_hand
from experiments.benchmarks import _memory_float8
from experiments.benchmarks._attention import (
    choose_attention,
    with_attention,
)
from experiments.benchmarks._train_steps import make_step, measure_cost
from experiments.benchmarks.real_models import REAL_MODELS
from experiments.benchmarks.workloads import WORKLOADS, Workload
from experiments.harness import plot_style, results
from experiments.harness.files import read_json
from experiments.harness.output import RESULTS, save_figure, save_table
from experiments.harness.plot_style import decorate
from experiments.harness.results import Column
from mpjax import cost

NAME = "memory"
# By name: the precision policy, and which values `jax.checkpoint` saves.
STEPS: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "mixed_float16": ("mixed_float16", None),
    "mixed_bfloat16": ("mixed_bfloat16", None),
    "mixed_bfloat16, checkpointed": (
        "mixed_bfloat16",
        "dots_with_no_batch_dims_saveable",
    ),
}
COLUMNS = (
    Column("workload", "workload"),
    Column("batch", "batch_size", "{:,}"),
    Column("step", "name"),
    Column("temporaries, MB", "temporaries_mb", "{:,.1f}"),
    Column("to float32", "temporaries_ratio", "{:.3f}"),
    Column("peak, MB", "peak_mb", "{:,.1f}"),
    Column("to float32 ", "peak_ratio", "{:.3f}"),
    Column("moved, MB", "moved_mb", "{:,.0f}"),
    Column("roofline, ms", "roofline_ms", "{:.3g}"),
    Column("bound by", "bound"),
)


def main(config: Config) -> dict[str, Any]:
    """Compiles every step; writes the table and the plot.

    Returns:
      What the result file holds.

    Raises:
      ConfigError: if --attention is cudnn, which the device does not support.
      RuntimeError: if this machine cannot compile for the device.
      WorkdirError: if the file cannot be written.
    """
    device = None if config.device == "present" else config.device
    names = config.workload_names()
    attention = choose_attention(config.attention, device)
    if config.float8:
        return _measure_each(_memory_float8, None, names, device, attention, config)
    if names[0] in REAL_MODELS:
        return _measure_each(by_hand, by_hand.draw, names, device, attention, config)
    runs = _measure_over_batch_sizes(names, device, attention)
    return _save(NAME, COLUMNS, draw, device, runs, config)


def _save(
    name: str,
    columns: tuple[Column, ...],
    draw: Callable[[dict[str, Any]], Figure] | None,
    device: str | None,
    runs: list[dict[str, Any]],
    config: Config,
) -> dict[str, Any]:
    """Writes the result file and the plot, if any; returns what the file holds."""
    compiled_for = cost.get_device(device).name
    table = {
        "experiment": name,
        "compiled_for": compiled_for,
        "environment": results.environment(),
        "runs": runs,
    }
    output = _output_file(name, config)
    save_table(output, table, f"compiled for {compiled_for}", columns)
    if draw is not None:
        save_figure(output.with_suffix(".png"), draw(table))
    return table


def _output_file(name: str, config: Config) -> Path:
    file = f"{name}_{config.device}_jax{jax.__version__}.json"
    return config.output or RESULTS / file


def measure(
    name: str, workload: Workload, batch_size: int, device: str | None
) -> list[dict[str, Any]]:
    """Compiles the steps of one model at one batch size.

    Args:
      name: name of the model in the table.
      workload: the model.
      batch_size: examples per step.
      device: as `mpjax.cost.analyze` takes it; None for the one of this machine.

    Returns:
      A row of the table per step; see COLUMNS. Ratios are to the float32 step.
    """
    runs: list[dict[str, Any]] = []
    for step_name, (policy, checkpoint_policy) in STEPS.items():
        step, state = make_step(workload, policy, checkpoint_policy=checkpoint_policy)
        run = {"workload": name, "batch_size": batch_size, "name": step_name}
        run |= measure_cost(workload, step, state, batch_size, device)
        for key in ("temporaries", "peak"):
            base = (runs or [run])[0][f"{key}_mb"]
            run[f"{key}_ratio"] = run[f"{key}_mb"] / base if base else None
        runs.append(run)
    return runs


def draw(table: dict[str, Any]) -> Figure:
    """Draws peak memory over batch size, and its ratio to float32, per model.

    Args:
      table: what the result file holds.
    """
    runs = table["runs"]
    workloads = list(dict.fromkeys(run["workload"] for run in runs))
    title = f"Memory of a training step, compiled for {table['compiled_for']}"
    figure = plot_style.new_figure(4.6, title)
    panels = figure.subplots(
        2, len(workloads), sharex="col", sharey="row", squeeze=False
    )
    styles = plot_style.line_styles(list(STEPS))
    for column, workload in enumerate(workloads):
        peak, ratio = panels[:, column]
        for name, style in styles.items():
            own = [r for r in runs if (r["workload"], r["name"]) == (workload, name)]
            sizes = [run["batch_size"] for run in own]
            dots = plot_style.dots(style)
            peak.plot(sizes, [run["peak_mb"] for run in own], **dots)
            ratio.plot(sizes, [run["peak_ratio"] for run in own], **dots)
        # Panels may be narrower than a name.
        title = textwrap.fill(workload.replace("_", " "), 84 // len(workloads))
        decorate(peak, title, None, None if column else "peak, MB")
        decorate(ratio, "", "batch size", None if column else "peak, times float32's")
        plot_style.log2_axis(ratio.xaxis, max_ticks=5)
        plot_style.reference_line(ratio, 0.5, "" if column else "half of float32's")
    plot_style.log_axis(panels[0, 0].yaxis)
    panels[1, 0].set_ylim(0, 1.2)
    if len(workloads) > 2:  # no room for labels beside the curves
        plot_style.key_below(figure, *panels[0, 0].get_legend_handles_labels())
    else:
        plot_style.label_ends(*panels[:, -1])
    return figure


def _measure_over_batch_sizes(
    names: list[str], device: str | None, attention: str
) -> list[dict[str, Any]]:
    runs = []
    cases = [(name, batch_size) for name in names for batch_size in BATCH_SIZES[name]]
    for name, batch_size in tqdm(cases, desc="compiling", disable=None):
        workload = with_attention(WORKLOADS[name](), attention)
        runs += measure(name, workload, batch_size, device)
    return runs


def _measure_each(
    kind: ModuleType,
    plot: Callable[[dict[str, Any]], Figure] | None,
    names: list[str],
    device: str | None,
    attention: str,
    config: Config,
) -> dict[str, Any]:
    """Measures models; writes the table after each, which takes minutes.

    The rows of other models in the file stay; each says at which commit it was made.

    Args:
      kind: the module that measures one of them, with the `NAME` and the `COLUMNS` of
        the table.
      plot: draws the table.
      names: of the models.
      device: as `mpjax.cost.analyze` takes it.
      attention: how the models attend.
      config: the settings.
    """
    path = _output_file(kind.NAME, config)
    runs = read_json(path)["runs"] if path.exists() else []
    commit = results.environment()["commit"]
    order = [*WORKLOADS, *REAL_MODELS]
    table: dict[str, Any] = {}
    for name in tqdm(names, desc="compiling", disable=None):
        is_real = name in REAL_MODELS
        workload = REAL_MODELS[name]("full") if is_real else WORKLOADS[name]()
        new = kind.measure(name, with_attention(workload, attention), device)
        runs = [run for run in runs if run["workload"] != name]
        runs += [{**run, "commit": commit} for run in new]
        runs.sort(key=lambda run: order.index(run["workload"]))
        table = _save(kind.NAME, kind.COLUMNS, plot, device, runs, config)
        jax.clear_caches()
    return table
