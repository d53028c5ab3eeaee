"""Memory, communication and step times of language models on 1 to 512 GPUs.

    python -m experiments.benchmarks.scaling      # 35 min on 2 cores, no GPU needed
    python -m experiments.benchmarks.scaling --models gpt_1.3b --num-gpus 8 64

Compiles whole training steps for a cluster that this machine need not have
(`mpjax.cost.device_mesh`; needs `pip install "jax[cuda13]"`, and JAX_PLATFORMS=cpu
where there is no GPU), from shapes alone. Memory and bytes sent are read from the
compiled code. Times are modelled, not measured: see `mpjax.cost.analyze`.

The models are GPT-3's of 1.3 and 6.7 billion parameters ("Language Models are Few-Shot
Learners", arXiv:2005.14165, table 2.1) on 1024 tokens, with AdamW: a scan over layers,
each of which is rematerialized in the backward pass. Parameters and optimizer state are
split over the eight GPUs of a node (`fsdp`) and replicated over nodes (`data`); the
batch is split over all. Activations are pinned to the split of the batch: left to
itself, XLA splits some of them over their units, and sends many times as much.

Gradients are reduced in float32, the default of `mpjax.make_train_step`, and in half
policies in the compute dtype too, for comparison.

The number of sequences on each GPU stays the same (weak scaling). Efficiency is the
modelled time on the fewest GPUs over that on many: best where all communication
overlaps the rest, worst where none does.
"""

from experiments.configs.scaling import NUM_PER_NODE, Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.benchmarks.scaling", Config, doc=__doc__)

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from experiments.benchmarks._attention import (
    attention_in,
    choose_attention,
    with_attention,
)
from experiments.benchmarks._train_steps import make_step
from experiments.benchmarks.real_models import gpt2
from experiments.benchmarks.workloads import Workload
from experiments.harness import plot_style, results
from experiments.harness.output import RESULTS, save_figure, save_table
from experiments.harness.plot_style import decorate
from experiments.harness.results import Column
from mpjax import cost
from mpjax.sharding import batch_sharding

NAME = "scaling"
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
MODELS: dict[str, dict[str, int]] = {
    "gpt_1.3b": {"width": 2048, "num_layers": 24, "num_heads": 16},
    "gpt_7b": {"width": 4096, "num_layers": 32, "num_heads": 32},
}
_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")
# Modules whose outputs have tokens along axis 1.
_PINNED = (nn.Dense, nn.Embed, nn.LayerNorm)
_YES_OR_NO = {True: "yes", False: "no"}.__getitem__
COLUMNS = (
    Column("model", "model"),
    Column("policy", "policy"),
    Column("reduced in", "reduce_dtype"),
    Column("GPUs", "num_gpus", "{:,}"),
    Column("batch", "batch_size", "{:,}"),
    Column("peak, GB", "peak_gb", "{:.1f}"),
    Column("fits", "fits", _YES_OR_NO),
    Column("all-gather, GB", "all-gather_gb", "{:.2f}"),
    Column("reduce-scatter, GB", "reduce-scatter_gb", "{:.2f}"),
    Column("all-reduce, GB", "all-reduce_gb", "{:.2f}"),
    Column("other, GB", "other_gb", "{:.2f}"),
    Column("compute, ms", "compute_ms", "{:,.0f}"),
    Column("memory, ms", "memory_ms", "{:,.0f}"),
    Column("communication, ms", "communication_ms", "{:,.0f}"),
    Column("best, ms", "best_ms", "{:,.0f}"),
    Column("worst, ms", "worst_ms", "{:,.0f}"),
    Column("efficiency, best", "best_efficiency", "{:.2f}"),
    Column("worst", "worst_efficiency", "{:.2f}"),
)


def main(config: Config) -> dict[str, Any]:
    """Compiles every step; writes the table and the plot, after each model.

    Returns:
      What the result file holds.

    Raises:
      ConfigError: if --attention is cudnn, which the device does not support.
      RuntimeError: if this machine cannot compile for the device.
      WorkdirError: if the file cannot be written.
    """
    attention = choose_attention(config.attention, config.device)
    device = cost.get_device(config.device)
    table: dict[str, Any] = {
        "experiment": NAME,
        "compiled_for": device.name,
        "memory_gb": (device.memory_bytes or 0) / 1e9,
        "environment": results.environment(),
        "runs": [],
    }
    file = f"{NAME}_{config.device}_jax{jax.__version__}.json"
    output = config.output or RESULTS / file
    for name in config.model_names():
        workload = with_attention(make_workload(**MODELS[name]), attention)
        table["runs"] += measure(name, workload, config)
        save_table(output, table, f"compiled for {device.name}", COLUMNS)
        save_figure(output.with_suffix(".png"), draw(table))
    return table


def make_workload(**fields: int) -> Workload:
    """Returns a GPT with a rematerialized scan over its layers.

    Args:
      **fields: of `GPT2`, such as `width`.
    """
    return gpt2("full", scan=True, remat=True, tanh_gelu=True, **fields)


def measure(name: str, workload: Workload, config: Config) -> list[dict[str, Any]]:
    """Compiles the steps of one model.

    Args:
      name: name of the model in the table.
      workload: the model, with axes (batch, tokens, units) in its layers.
      config: GPUs and batch size.

    Returns:
      A row of the table for each policy and number of GPUs; see COLUMNS.
    """
    runs = []
    cases = [
        (policy, num, reduce_dtype)
        for policy in POLICIES
        for reduce_dtype in ("float32", "compute")
        for num in sorted(config.num_gpus)
        if reduce_dtype == "float32" or (policy != "float32" and num > 1)
    ]
    for case in tqdm(cases, desc=f"compiling {name}", disable=None):
        policy, num_gpus, reduce_dtype = case
        num_split = min(num_gpus, NUM_PER_NODE)
        axes = {"data": num_gpus // num_split, "fsdp": num_split}
        batch_size = num_gpus * config.batch_size_per_gpu
        run = {"model": name, "policy": policy, "num_gpus": num_gpus, "mesh": axes}
        run |= {"batch_size": batch_size, "reduce_dtype": reduce_dtype}
        mesh = cost.device_mesh(config.device, axes)
        run |= _measure_on(mesh, workload, policy, reduce_dtype, batch_size)
        first = next((r for r in runs if r["policy"] == policy), run)
        for key in ("best", "worst"):
            run[f"{key}_efficiency"] = first["best_ms"] / run[f"{key}_ms"]
        runs.append(run)
    return runs


def draw(table: dict[str, Any]) -> Figure:
    """Draws memory, step time and efficiency over the number of GPUs, per model.

    The rows are those of gradients reduced in float32.

    Args:
      table: what the result file holds.
    """
    runs = [run for run in table["runs"] if run["reduce_dtype"] == "float32"]
    models = list(dict.fromkeys(run["model"] for run in runs))
    title = (
        f"A training step on many GPUs, modelled from code for {table['compiled_for']}"
        ": all communication overlaps (broad), none does (dotted)"
    )
    figure = plot_style.new_figure(6.4, title)
    panels = figure.subplots(3, len(models), sharex=True, sharey="row", squeeze=False)
    styles = plot_style.line_styles(list(POLICIES))
    for column, model in enumerate(models):
        peak, time, efficiency = panels[:, column]
        for place, (policy, style) in enumerate(styles.items()):
            own = [r for r in runs if (r["model"], r["policy"]) == (model, policy)]
            gpus = [run["num_gpus"] for run in own]
            values = [run["peak_gb"] for run in own]
            peak.plot(gpus, values, **plot_style.dots(style))
            # Round dots, those of equal curves between each other's.
            ls = (2.0 * place, (0.01, 2.0 * len(styles)))
            dotted = {"color": style["color"], "ls": ls, "lw": 2, "zorder": 9}
            dotted["dash_capstyle"] = "round"
            _draw_range(time, own, "ms", style, dotted)
            _draw_range(efficiency, own, "efficiency", style, dotted)
        left = column == 0
        text = f"memory of a GPU, {table['memory_gb']:.0f} GB" if left else ""
        plot_style.reference_line(peak, table["memory_gb"], text)
        decorate(peak, model, None, "peak of a GPU, GB" if left else None)
        decorate(time, "", None, "modelled step, ms" if left else None)
        decorate(efficiency, "", "GPUs", "efficiency" if left else None)
        plot_style.log2_axis(efficiency.xaxis)
        gpus = sorted({run["num_gpus"] for run in runs})
        efficiency.set_xticks(gpus, [f"{num:,}" for num in gpus])
    for axes in panels[:2, 0]:
        plot_style.log_axis(axes.yaxis)
    panels[2, 0].set_ylim(0, 1.1)
    plot_style.key_below(figure, *panels[0, 0].get_legend_handles_labels())
    return figure


def _draw_range(
    axes: Axes,
    runs: list[dict[str, Any]],
    key: str,
    style: dict[str, Any],
    dotted: dict[str, Any],
) -> None:
    """Draws the best case as a broad curve with dots, the worst dotted."""
    gpus = [run["num_gpus"] for run in runs]
    best, worst = ([run[f"{case}_{key}"] for run in runs] for case in ("best", "worst"))
    axes.plot(gpus, best, **plot_style.dots(style))
    axes.plot(gpus, worst, **dotted)


def _measure_on(
    mesh: Mesh, workload: Workload, policy: str, reduce_dtype: str, batch_size: int
) -> dict[str, Any]:
    """Compiles a step on a mesh; returns what a row says of it."""
    pinned = _pin_activations(workload, mesh)
    step, state = make_step(pinned, policy, mesh=mesh, reduce_dtype=reduce_dtype)
    make_batch = lambda key: workload.make_batch(key, batch_size)
    batch = jax.eval_shape(make_batch, jax.random.key(0))
    report = cost.analyze(step, state, batch)
    jaxpr = lambda: str(jax.make_jaxpr(step)(state, batch))
    sent = {
        name: sum(c.sent_bytes for c in report.collectives if c.name == name) / 1e9
        for name in _COLLECTIVES
    }
    seconds = {
        "compute": report.compute_s,
        "memory": report.memory_s,
        "communication": report.communication_s,
        "best": report.best_s,
        "worst": report.worst_s,
    }
    return {
        "peak_gb": report.peak_bytes / 1e9,
        "fits": report.peak_bytes <= (report.memory_bytes or 0),
        **{f"{name}_gb": gb for name, gb in sent.items()},
        "other_gb": max(0.0, report.sent_bytes / 1e9 - sum(sent.values())),
        **{f"{name}_ms": None if s is None else 1e3 * s for name, s in seconds.items()},
        "attention": attention_in(workload, jaxpr),
        "collectives": [
            dataclasses.asdict(c) | {"axes": list(c.axes)} for c in report.collectives
        ],
    }


def _pin_activations(workload: Workload, mesh: Mesh) -> Workload:
    """Returns the model with the outputs of its layers split as the batch is."""

    def pin(next_fn, args, kwargs, context):
        out = next_fn(*args, **kwargs)
        is_output = context.method_name in ("__call__", "attend")
        if is_output and isinstance(context.module, _PINNED) and out.ndim == 3:
            return jax.lax.with_sharding_constraint(out, batch_sharding(mesh))
        return out

    def loss_fn(params, batch, key):
        with nn.intercept_methods(pin):
            return workload.loss_fn(params, batch, key)

    return dataclasses.replace(workload, loss_fn=loss_fn)
