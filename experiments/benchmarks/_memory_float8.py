"""Memory and traffic of a train step in float8, beside bfloat16."""

from typing import Any

import jax

import mpjax
from experiments.benchmarks._train_steps import make_step
from experiments.benchmarks.workloads import Workload
from experiments.harness.results import Column
from mpjax import cost

NAME = "memory_float8"
# The name scope of the last layer, over a large vocabulary: it stays bfloat16.
HEADS = {
    "gpt2": "attend$",
    "gpt2_tanh": "attend$",
    "gpt2_scan": "attend$",
    "gpt2_scan_remat": "attend$",
    "llama": "Llama/Dense_0$",
    "llama_sdpa": "Llama/Dense_0$",
}
COLUMNS = (
    Column("workload", "workload"),
    Column("batch", "batch_size", "{:,}"),
    Column("step", "name"),
    Column("temporaries, MB", "temporaries_mb", "{:,.0f}"),
    Column("to bfloat16", "temporaries_ratio", "{:.3f}"),
    Column("moved, MB", "moved_mb", "{:,.0f}"),
    Column("to bfloat16 ", "moved_ratio", "{:.3f}"),
    Column("arithmetic at peak, ms", "compute_ms", "{:.2f}"),
    Column("memory at peak, ms", "memory_ms", "{:.2f}"),
)


def policies(name: str) -> dict[str, str | mpjax.PolicyRules]:
    """Returns the policies of a model's steps, bfloat16 first, by name of the row."""
    if name not in HEADS:
        return {x: x for x in ("mixed_bfloat16", "mixed_float8")}
    rules = [(HEADS[name], "mixed_bfloat16")]
    return {
        "mixed_bfloat16": "mixed_bfloat16",
        "mixed_float8, head in bfloat16": mpjax.PolicyRules(
            rules, default="mixed_float8"
        ),
    }


def make_steps(name: str, workload: Workload) -> tuple[dict[str, Any], Any, Any]:
    """Returns the train steps by name of the row, and the types of state and batch.

    Args:
      name: name of the model.
      workload: the model; it has its batch size on a GPU.
    """
    _, state = make_step(workload, "mixed_bfloat16")
    batch_size = workload.batch_sizes["gpu"]
    make_batch = lambda key: workload.make_batch(key, batch_size)
    batch = jax.eval_shape(make_batch, jax.random.key(0))
    tx = mpjax.with_loss_scale(workload.tx, mpjax.DynamicLossScale())
    steps = {
        row: mpjax.make_train_step(workload.loss_fn, tx, policy=policy)
        for row, policy in policies(name).items()
    }
    return steps, state, batch


def measure(name: str, workload: Workload, device: str | None) -> list[dict[str, Any]]:
    """Compiles the steps of one model; returns their rows, see COLUMNS.

    Args:
      name: name of the model.
      workload: the model.
      device: as `mpjax.cost.analyze` takes it; None for the one of this machine.
    """
    steps, *args = make_steps(name, workload)
    rows: list[dict[str, Any]] = []
    for row_name, step in steps.items():
        report = cost.analyze(step, *args, device=device)
        seconds = {"compute_ms": report.compute_s, "memory_ms": report.memory_s}
        row = {
            "workload": name,
            "batch_size": workload.batch_sizes["gpu"],
            "name": row_name,
            "temporaries_mb": report.temporary_bytes / 1e6,
            "moved_mb": report.moved_bytes / 1e6,
            **{key: None if s is None else 1e3 * s for key, s in seconds.items()},
        }
        for key in ("temporaries", "moved"):
            base = (rows or [row])[0][f"{key}_mb"]
            row[f"{key}_ratio"] = row[f"{key}_mb"] / base if base else None
        rows.append(row)
    return rows
