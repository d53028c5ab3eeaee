"""The figure at the top of README.md: three numbers out of the result files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness import plot_style
from experiments.harness.intervals import mean_interval
from experiments.harness.plot_style import decorate, text_color

ERRORS = "accuracy_real_cpu_avx2_jax0.12.0.1.json"
MEMORY = "memory_real_h100_jax0.12.0.1.json"
TRAINED = "mnist_convnet.json"
MODEL, HALF = "gpt2", "mixed_bfloat16"
TITLES = {
    "gpt2": "GPT-2",
    "gpt2_24_layers_scan_remat": "GPT-2, 24 layers,\nscan and remat",
    "gpt2_24_layers": "GPT-2, 24 layers",
    "llama": "Llama",
    "resnet50": "ResNet-50",
}
BY_HAND, AUTOCAST = plot_style.ORANGE, plot_style.BLUE


def draw(results: Path) -> Figure:
    """Draws gradient errors of autocast and by hand, with three numbers beside them.

    Args:
      results: directory of the result files.

    Raises:
      OSError: if one is missing.
      LookupError: if one lacks a row.
    """
    errors, memory, trained = (
        json.loads((results / name).read_text())["runs"]
        for name in (ERRORS, MEMORY, TRAINED)
    )
    title = "Half precision by mpjax.autocast, with no change to the model"
    figure = plot_style.new_figure(3.7, title, 8.0)
    chart, side = figure.subplots(
        1, 2, width_ratios=(4, 3), gridspec_kw={"wspace": 0.1}
    )
    _draw_errors(chart, [run for run in errors if run["policy"] == HALF])
    _write_numbers(side, numbers(errors, memory, trained))
    return figure


def numbers(
    errors: list[dict[str, Any]],
    memory: list[dict[str, Any]],
    trained: list[dict[str, Any]],
) -> list[tuple[str, str]]:
    """Returns the three numbers, each with what it says.

    Args:
      errors: rows of `ERRORS`.
      memory: rows of `MEMORY`.
      trained: rows of `TRAINED`.
    """
    error = _row(errors, model=MODEL, policy=HALF)
    ratio, low, high = error["ratio_autocast"]
    peak = {
        name: _row(memory, workload=MODEL, name=name)["peak_mb"]
        for name in ("float32", HALF)
    }
    accuracy = {
        policy: _row(trained, policy=policy)["test_accuracy"]
        for policy in ("float32", "mixed_float16")
    }
    return [
        (
            f"{ratio:.2f}\N{MULTIPLICATION SIGN}",
            "the gradient error of half by hand\n"
            f"small GPT-2, bfloat16; 95 %: {low:.2f} to {high:.2f}",
        ),
        (
            f"{peak[HALF] / peak['float32']:.2f}\N{MULTIPLICATION SIGN}",
            "the peak memory of float32, as by hand\n"
            f"GPT-2, {peak['float32'] / 1e3:.1f} to {peak[HALF] / 1e3:.1f} GB, "
            "compiled for an H100",
        ),
        (
            f"{accuracy['mixed_float16']:.2%}".replace("%", " %"),
            f"test accuracy, beside {accuracy['float32']:.2%}".replace("%", " %")
            + " in float32\nDeepConvNet on MNIST, float16, one seed",
        ),
    ]


def _draw_errors(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Draws a line per model from the error by hand to autocast's, over seeds."""
    rows = sorted(rows, key=lambda row: row["ratio_autocast"][0])
    ways = {"by_hand": (BY_HAND, 10), "autocast": (AUTOCAST, 6)}
    for place, row in enumerate(rows):
        ends = []
        for key, (color, size) in ways.items():
            mean, low, high = mean_interval(row["errors"][key])
            ends.append(mean)
            axes.plot([low, high], [place, place], color=color, lw=3, alpha=0.4)
            axes.plot(mean, place, "o", color=color, ms=size, zorder=3)
        axes.plot(ends, [place, place], color="0.7", lw=1.5, zorder=1)
    texts = {"by_hand": "by hand, on every layer", "autocast": "autocast"}
    for key, (color, _) in ways.items():
        axes.annotate(
            texts[key],
            (np.mean(rows[0]["errors"][key]), 0),
            (-5, 7),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=plot_style.NORMAL,
            color=text_color(color),
        )
    names = [TITLES.get(row["model"]) or str(row["model"]) for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.8)
    plot_style.log_axis(axes.xaxis)
    plot_style.percent_axis(axes.xaxis)
    axes.margins(x=0.15)
    num_seeds = len(rows[0]["errors"]["autocast"])
    text = f"relative to float64: mean and 95 % interval of {num_seeds} seeds"
    decorate(axes, "error of the gradient in bfloat16, small models", text, None)
    axes.grid(visible=False, axis="y")


def _write_numbers(axes: Axes, numbers: list[tuple[str, str]]) -> None:
    axes.set_axis_off()
    for place, (number, text) in enumerate(numbers):
        y = 1.0 - 0.36 * place
        big = {"fontsize": 20, "color": text_color(AUTOCAST), "weight": "bold"}
        axes.text(0.0, y, number, va="top", **big)
        first, _, rest = text.partition("\n")
        axes.text(0.0, y - 0.13, first, va="top", fontsize=plot_style.NORMAL)
        small = {"fontsize": plot_style.SMALL, "color": "0.35"}
        axes.text(0.0, y - 0.2, rest, va="top", **small)


def _row(rows: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    """Returns the row that has the values.

    Raises:
      LookupError: if none has.
    """
    for row in rows:
        if values.items() <= row.items():
            return row
    raise LookupError(f"no row with {values}")
