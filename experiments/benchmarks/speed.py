"""Step times of mpjax beside other libraries, interleaved.

    python -m experiments.benchmarks.speed                    # 15 min on 2 cores
    python -m experiments.benchmarks.speed --workloads convnet,transformer,bigru

A baseline is one way to take the training step: by hand, by mpjax, by another library.
All train the same network from the same values on the same batch. A baseline whose loss
after three steps differs from that of float32 by hand, or has not come as far, is
reported as wrong. One round times each baseline once, in a shuffled order, so that
whatever else the machine does hits all alike; ratios are medians over rounds of the
ratio within a round. Where a step is short, as on a GPU, as many steps in a row are
timed as take about 50 ms.

Baselines are left out, by name and with the reason, if their library is not installed
(`pip install -e ".[bench]"`), if they fail to compile or to take their first steps, and
if these take over 20 s and 20 times float32's time; --baselines lifts that time limit.
Differences of a few per cent between baselines can be those between two compilations of
one step.

On a GPU that supports it the attention of transformers is cuDNN's kernel in all half
baselines. In float32, which the kernel refuses, it is XLA's operations, so that
speedups over float32 include what the kernel saves; --attention xla compares like with
like. Each row of the result file records its `attention`.
"""

from experiments.configs.speed import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.benchmarks.speed", Config, doc=__doc__)

import functools
import math
import re
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks._attention import (
    attention_in,
    choose_attention,
    with_attention,
)
from experiments.benchmarks._timing import median_ratio, seconds, time_rounds
from experiments.benchmarks.baselines import (
    by_hand,
    flax,
    keras,
    mpjax,
    mpx,
    torch,
    tuned,
)
from experiments.benchmarks.baselines.baseline import FLOAT32, Baseline, Case, Step
from experiments.benchmarks.baselines.warmup import (
    Compiled,
    matches_reference,
    warm_up_all,
)
from experiments.benchmarks.workloads import WORKLOADS, mlp
from experiments.harness import plot_style, results
from experiments.harness.errors import ConfigError
from experiments.harness.output import RESULTS, save_figure, save_table
from experiments.harness.plot_style import decorate
from experiments.harness.results import Column

NAME = "speed"
PEERS = ("keras", "mixed-precision-for-jax", "torch")
MIN_TIMED_S = 0.05
MAX_STEPS = 100  # timed at once


def format_ms(ms: float) -> str:
    """Returns a time with four digits, and never an exponent."""
    return f"{ms:.{max(0, 3 - math.floor(math.log10(max(ms, 1e-3))))}f}"


def _format_quartiles(quartiles_ms: list[float]) -> str:
    return " to ".join(map(format_ms, quartiles_ms))


COLUMNS = (
    Column("baseline", "name"),
    Column("ms/step, median", "median_ms", format_ms),
    Column("quartiles", "quartiles_ms", _format_quartiles),
    Column("times float32", "speedup", "{:.2f}"),
    Column("ratio", "ratio", "{:.3f}"),
    Column("to", "reference"),
    Column("temporaries, MB", "temporary_mb", "{:,.0f}"),
    Column("loss", "loss_after", "{:.4f}"),
)


def main(config: Config) -> list[dict[str, Any]]:
    """Times every baseline of every model; returns what the result files hold.

    Raises:
      ConfigError: if --baselines matches no baseline of a model, or if --attention is
        cudnn, which the device does not support.
      WorkdirError: if a result cannot be written.
    """
    # Taken first: the result files change the state of the checkout.
    environment = results.environment((*results.PACKAGES, *PEERS))
    tables = []
    for name in config.workload_names():
        tables.append(measure(config, name, environment))
        _save(config.output_dir or RESULTS, tables[-1])
    return tables


def all_baselines() -> list[Baseline]:
    """Returns every baseline, those that others are compared with first."""
    modules = (by_hand, mpjax, flax, mpx, keras, torch, tuned)
    return [baseline for module in modules for baseline in module.baselines()]


def choose(
    baselines: list[Baseline], workload: str, pattern: str, platform: str = "cpu"
) -> tuple[list[Baseline], dict[str, str]]:
    """Chooses what to time.

    Args:
      baselines: all that there are.
      workload: name of the model that is trained.
      pattern: a regular expression to find in names.
      platform: "cpu" or "gpu".

    Returns:
      The baselines to time, and how to install the libraries of the others, by name.

    Raises:
      ConfigError: if the pattern matches no name.
    """
    possible = [
        baseline
        for baseline in baselines
        if workload in (baseline.workloads or [workload])
        and baseline.platform in (None, platform)
    ]
    wanted = {b.name for b in possible if re.search(pattern, b.name)}
    if not wanted:
        raise ConfigError(
            f"--baselines {pattern!r} matches no baseline of {workload}; there are "
            f"{'; '.join(baseline.name for baseline in possible)}."
        )
    references = {baseline.name: baseline.reference for baseline in possible}
    while not {references[name] for name in wanted} <= wanted:
        wanted |= {references[name] for name in wanted}
    chosen = [b for b in possible if b.name in wanted | {FLOAT32}]
    left_out = {b.name: b.needs[1] for b in chosen if b.needs and not b.is_installed()}
    return [b for b in chosen if b.name not in left_out], left_out


def measure(
    config: Config, workload_name: str, environment: dict[str, Any]
) -> dict[str, Any]:
    """Times every baseline of one model; returns what its result file is to hold."""
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    case, batch_size = _make_case(config, workload_name, platform)
    chosen, left_out = choose(
        all_baselines(), workload_name, config.baselines, platform
    )
    compiled, failures = warm_up_all(
        chosen, case, time_limit=not config.baselines, max_minutes=config.max_minutes
    )
    left_out |= failures
    for name, reason in left_out.items():
        print(f"left out: {name}; {reason}")
    steps = {name: baseline.step for name, baseline in compiled.items()}
    num_steps = {name: num_steps_to_time(step) for name, step in steps.items()}
    times_ms = time_steps(steps, config.num_rounds, config.seed, num_steps)
    return {
        "experiment": NAME,
        "workload": workload_name,
        "title": case.workload.title,
        "batch_size": batch_size,
        "num_rounds": config.num_rounds,
        "seed": config.seed,
        "environment": environment,
        "left_out": left_out,
        "runs": [
            summarize(baseline, times_ms, compiled)
            | {
                "num_steps_timed": num_steps[baseline.name],
                "attention": attention_in(case.workload, steps[baseline.name].program),
            }
            for baseline in chosen
            if baseline.name in compiled
        ],
    }


def _make_case(config: Config, workload_name: str, platform: str) -> tuple[Case, int]:
    """Returns what every baseline starts from, and its batch size."""
    make_workload = WORKLOADS[workload_name]
    workload = mlp(config.num_units) if make_workload is mlp else make_workload()
    workload = with_attention(workload, choose_attention(config.attention))
    batch_size = config.batch_size or workload.batch_sizes[platform]
    keys = jax.random.split(jax.random.key(config.seed))
    params = workload.init_params(keys[0])
    batch = workload.make_batch(keys[1], batch_size)
    return Case(workload, params, batch), batch_size


def num_steps_to_time(step: Step) -> int:
    """Returns how many steps in a row take MIN_TIMED_S, at most MAX_STEPS."""
    num_steps = 1
    for _ in range(2):  # A step among several is shorter than one alone.
        total_s = seconds(functools.partial(step.run, num_steps))
        num_steps = min(
            MAX_STEPS, math.ceil(MIN_TIMED_S / max(total_s / num_steps, 1e-9))
        )
        if num_steps == 1:
            break
    return num_steps


def time_steps(
    steps: dict[str, Step], num_rounds: int, seed: int, num_steps: dict[str, int]
) -> dict[str, list[float]]:
    """Returns milliseconds per step by name, a list over interleaved rounds.

    Args:
      steps: what to time, by name.
      num_rounds: how often each is timed.
      seed: seed for the order within rounds.
      num_steps: how many steps are timed at once, by name.
    """
    fns = {n: functools.partial(step.run, num_steps[n]) for n, step in steps.items()}
    times_ms = time_rounds(fns, num_rounds, seed=seed)
    return {name: [t / num_steps[name] for t in ts] for name, ts in times_ms.items()}


def summarize(
    baseline: Baseline, times_ms: dict[str, list[float]], compiled: dict[str, Compiled]
) -> dict[str, Any]:
    """Returns the row of a baseline in the table; see COLUMNS."""
    times = times_ms[baseline.name]
    own = compiled[baseline.name]
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    reference = baseline.reference
    has_reference = reference in times_ms and reference != baseline.name
    memory = own.step.temporary_bytes
    return {
        "name": baseline.name,
        "median_ms": statistics.median(times),
        "quartiles_ms": [quartiles[0], quartiles[-1]],
        "speedup": median_ratio(times_ms[FLOAT32], times),
        "ratio": median_ratio(times, times_ms[reference]) if has_reference else None,
        "reference": reference if has_reference else "-",
        "temporary_mb": None if memory is None else memory / 1e6,
        "first_s": round(own.first_s, 2),
        "loss_before": own.losses[0],
        "loss_after": own.losses[1],
        "matches_reference": matches_reference(own.losses, compiled[FLOAT32].losses),
        "times_ms": [round(t, 3) for t in times],
    }


def _save(directory: Path, table: dict[str, Any]) -> None:
    environment, runs = table["environment"], table["runs"]
    machine = environment["machine"]
    path = directory / f"{NAME}_{table['workload']}_{machine}_jax{jax.__version__}.json"
    precision = environment["float32_matmul_precision"]
    title = ", ".join(_titles(table)) + f", float32 matmul {precision}"
    save_table(path, table, title, COLUMNS)
    save_figure(path.with_suffix(".png"), draw(table))
    for run in runs:
        if not run["matches_reference"]:
            losses = f"{run['loss_before']:.4f} to {run['loss_after']:.4f}"
            print(f"wrong: the loss of {run['name']} went from {losses}")


def _titles(table: dict[str, Any]) -> tuple[str, str]:
    """Returns what was timed, and on what."""
    environment = table["environment"]
    version = environment["versions"]["jax"]
    what = f"{table['title']}, batch {table['batch_size']}"
    return what, f"{environment['device']}, jax {version}"


def draw(table: dict[str, Any]) -> Figure:
    """Draws the median step time of each baseline, with quartiles, fastest on top.

    Args:
      table: what the result file holds.
    """
    runs = sorted(table["runs"], key=lambda run: run["median_ms"])
    title = ",\n".join(_titles(table))
    figure = plot_style.new_figure(0.22 * len(runs) + 1.3, title)
    axes = figure.subplots()
    own_by_format: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for place, run in enumerate(runs):
        formats = (f for f in ("bfloat16", "float16") if f in run["name"])
        own_by_format.setdefault(next(formats, "float32"), []).append((place, run))
    for name in filter(own_by_format.get, ("float32", "float16", "bfloat16")):
        color = plot_style.COLORS[name if name == "float32" else f"mixed_{name}"]
        _draw_times(axes, own_by_format[name], color, name)
    axes.set_yticks(range(len(runs)), [run["name"] for run in runs])
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.margins(x=0.12)
    text = "median time of a training step, with quartiles (bold: mpjax)"
    decorate(axes, text, "ms per step", None)
    axes.grid(visible=False, axis="y")
    for label, run in zip(axes.get_yticklabels(), runs, strict=True):
        label.set_fontweight("bold" if run["name"].startswith("mpjax") else "normal")
    plot_style.key_below(figure, *axes.get_legend_handles_labels())
    return figure


def _draw_times(
    axes: Axes, runs: list[tuple[int, dict[str, Any]]], color: str, label: str
) -> None:
    """Draws the bars of one format, each at its place, with the medians beside them."""
    medians = np.array([run["median_ms"] for _, run in runs])
    low, high = np.transpose([run["quartiles_ms"] for _, run in runs])
    axes.barh(
        [place for place, _ in runs],
        medians,
        color=color,
        label=label,
        height=0.7,
        xerr=np.maximum([medians - low, high - medians], 0),
        error_kw={"lw": 1, "ecolor": plot_style.BLACK},
    )
    for (place, run), end in zip(runs, np.maximum(medians, high), strict=True):
        axes.annotate(
            f" {format_ms(run['median_ms'])}",
            (end, place),
            va="center",
            fontsize=plot_style.SMALL,
        )
