"""The table of main results in README.md, computed from the result files."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.harness.intervals import interval_text
from experiments.harness.results import Column, markdown_table

COLUMNS = (
    Column("question", "question"),
    Column("result", "result"),
    Column("details", "page"),
)
_SSD_SCALES = "cpu_amx_bf16_jax0.12.0.1"
Run = dict[str, Any]
Runs = Callable[[str], list[Run]]  # of a result file, by name


def render(results: Path) -> str:
    """Returns the table, in Markdown.

    Args:
      results: the directory of the result files.

    Raises:
      OSError, LookupError, ValueError: if a result file is missing or damaged.
    """

    def runs(name: str) -> list[Run]:
        return json.loads((results / f"{name}.json").read_text())["runs"]

    rows = [
        {
            "question": question,
            "result": tell(runs),
            "page": f"[{page}](docs/results/{page}.md)",
        }
        for question, page, tell in _ROWS
    ]
    return f"\n{markdown_table(COLUMNS, rows)}\n"


def _parity(runs: Runs) -> str:
    found = {(r["policy"], r["loss_scale"]): r for r in runs("parity_4096x8192x5")}
    return (
        f"test accuracy {found['float32', 'none']['test_accuracy']} in float32; points "
        f"to it: {found['mixed_float16', 'dynamic']['difference']} in mixed_float16, "
        f"{found['mixed_bfloat16', 'none']['difference']} in mixed_bfloat16"
    )


def _convnet(runs: Runs) -> str:
    accuracies = ", ".join(
        f"{r['test_accuracy']:.2%} in {r['policy']}" for r in runs("mnist_convnet")
    )
    changed = [
        r["num_changed"]
        for r in runs("mnist_convnet_precisions")
        if r["precision"] == "float16"
    ]
    return (
        f"test accuracy {accuracies}; evaluation of the {len(changed)} networks in "
        f"float16 changes {sum(changed)} of {len(changed) * 10_000:,} predictions"
    )


def _speech(runs: Runs) -> str:
    return "test CER " + ", ".join(
        f"{r['test_cer']:.2%} in {r['policy']}" for r in runs("speech_ctc")
    )


def _updates(runs: Runs) -> str:
    found = {
        r["optimizer"]: f"{r['relative']:+.1%}, {r['difference']} points"
        for r in runs("speech_updates_cpu_avx2_jax0.12.0.1")
        if r["variant"] == "float16_updates"
    }
    return (
        f"CER to float32's: {found['nesterov']}, with Nesterov "
        f"momentum; {found['adam']}, with Adam"
    )


def _detector(runs: Runs) -> str:
    found = {r["variant"]: r for r in runs(f"ssd_scales_{_SSD_SCALES}")}
    differences = ", ".join(
        f"{found[name]['difference']} {title}"
        for name, title in (
            ("unscaled", "in float16 unscaled"),
            ("scale_8", "scaled by 8"),
            ("dynamic", "dynamically"),
        )
    )
    small = {r["variant"]: r for r in runs(f"ssd_scales_small_gradients_{_SSD_SCALES}")}
    unscaled = small["unscaled"]
    return (
        f"points of mAP to float32's {found['float32']['map07']}: {differences}; with "
        f"gradients made small, {unscaled['num_diverged']} of {unscaled['num_seeds']} "
        "unscaled runs diverge, and dynamic scaling differs by "
        f"{small['dynamic']['difference']}"
    )


def _gradients(runs: Runs) -> str:
    ratios = [
        r["error_autocast"] / r["error_hand_cast"]
        for r in runs("accuracy_cpu_amx_bf16_jax0.12.0.1")
        if r["policy"] == "mixed_bfloat16"
    ]
    return (
        f"errors in bfloat16 are {min(ratios):.2f} to {max(ratios):.2f} times those of "
        f"half by hand, median {statistics.median(ratios):.2f}, {len(ratios)} models"
    )


def _float8(runs: Runs) -> str:
    mlp, transformer, conformer = (
        row
        for row in runs("float8_cpu_amx_bf16_jax0.12.0.1")
        if row["precision"] == "mixed_float8:all"
    )
    errors = [
        interval_text(row["error_minus_bfloat16"], "{:+.2f}")
        for row in (mlp, conformer)
    ]
    loss = interval_text(transformer["loss_minus_bfloat16"], "{:+.3f}")
    return (
        f"points of error to bfloat16's: MLP {errors[0]}, Conformer {errors[1]} of "
        f"CER; loss of a transformer {loss}"
    )


def _memory(runs: Runs) -> str:
    rows = runs("memory_real_h100_jax0.12.0.1")
    found = {r["workload"]: r for r in rows if r["name"] == "mixed_bfloat16"}
    ratios = [r["temporaries_to_by_hand"] for r in found.values()]
    float16 = max(
        r["temporaries_to_by_hand"] for r in rows if r["name"] == "mixed_float16"
    )
    examples = ", ".join(
        f"{title} {found[name]['temporaries_ratio']:.2f}"
        for name, title in (
            ("gpt2", "GPT-2"),
            ("llama", "Llama blocks"),
            ("vit_b16", "ViT-B/16"),
            ("deep_speech2", "Deep Speech 2"),
        )
    )
    return (
        f"{examples} times float32's in bfloat16; {min(ratios):.2f} to "
        f"{max(ratios):.2f} times those of half by hand, in float16 up to "
        f"{float16:.2f}, {len(ratios)} models"
    )


def _speed(runs: Runs) -> str:
    found = {
        r["name"]: r["speedup"] for r in runs("speed_mlp_cpu_amx_bf16_jax0.12.0.1")
    }
    return (
        f"{found['mpjax, bfloat16']:.2f} times as fast in bfloat16 as in float32 by "
        f"hand; jmp {found['jmp, bfloat16']:.2f}, "
        f"Keras {found['Keras, mixed_bfloat16']:.2f}"
    )


_ROWS: tuple[tuple[str, str, Callable[[Runs], str]], ...] = (
    (
        "Keras guide, 30 steps, 5 seeds",
        "parity",
        _parity,
    ),
    ("DeepConvNet, 10 epochs", "precisions", _convnet),
    ("Mandarin speech, 3 epochs", "speech", _speech),
    ("float16 weights updated in float16 (paper: CER +80 %)", "speech", _updates),
    ("Loss scales of a detector, 3 seeds", "detection", _detector),
    ("Gradients against float64", "accuracy", _gradients),
    ("Trained in float8, 3 seeds", "parity", _float8),
    ("Temporaries of a step, compiled for an H100", "memory", _memory),
    ("A step of the MLP, CPU with bfloat16", "speed", _speed),
)
