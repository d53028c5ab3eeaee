"""Metrics of a run, as JSON lines, as TensorBoard events and in memory."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.harness.files import write_text
from experiments.harness.tensorboard import EventFile


class Recorder:
    """Keeps rows of metrics and writes them as they come.

    A row is `{"kind": "train" | "epoch" | ..., "step": int, name: number, ...}`, where
    `step` counts the batches seen, skipped ones included. A number that is not finite
    is written as NaN or Infinity, which Python's json reads back.
    """

    def __init__(self, directory: Path, *, first_step: int = 0):
        """Opens the run's metrics, dropping rows that a resumed run will write again.

        Args:
          directory: directory of the run.
          first_step: rows of later steps are dropped; 0 drops all.
        """
        self.path = directory / "metrics.jsonl"
        self.rows = [r for r in read_rows(self.path) if r["step"] <= first_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = self.path.open("a")
        self._events = EventFile(directory / "tensorboard", first_step=first_step)

    def write(self, kind: str, step: int, metrics: dict[str, Any]) -> None:
        """Records one row of scalars; bools become 0 or 1, arrays Python numbers."""
        values = {name: _number(value) for name, value in metrics.items()}
        row = {"kind": kind, "step": step, **values}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def select(self, kind: str, *, after: int = 0) -> list[dict[str, Any]]:
        """Returns the rows of one kind after a step."""
        return [r for r in self.rows if r["kind"] == kind and r["step"] > after]

    def flush(self) -> None:
        """Hands everything to the operating system."""
        self._file.flush()
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        try:
            self._file.close()
        finally:
            self._events.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines, without those that are damaged or incomplete."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines()
    return [row for row in map(_row, lines) if row is not None]


def weighted_mean(rows: list[dict[str, Any]], name: str) -> float:
    """Returns the mean of a metric over rows, weighted by `num_examples` if present.

    Non-finite values are left out, because they belong to skipped steps.
    """
    pairs = [
        (row[name], row.get("num_examples", 1))
        for row in rows
        if isinstance(row[name], (int, float)) and math.isfinite(row[name])
    ]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else math.nan


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"kind", "step"} <= row.keys() else None


def _number(value: Any) -> Any:
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        value = np.asarray(value).item()
    if isinstance(value, bool):
        return int(value)
    return value
