"""A result file: a table as JSON and on the terminal, and a plot."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.harness import results
from experiments.harness.files import translate_os_errors, write_json
from experiments.harness.plot_style import write_png
from experiments.harness.processes import is_first
from experiments.harness.results import Column

RESULTS = Path(__file__).parents[1] / "results"


def save_table(
    path: Path, table: dict[str, Any], title: str, columns: Sequence[Column]
) -> None:
    """Writes a table as JSON, its directory included, and prints it.

    Of several processes only the first one writes.

    Args:
      path: path of the result file.
      table: contents of the file; its `runs` are the rows.
      title: above the printed table.
      columns: columns of the printed table.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    if not is_first():
        return
    with translate_os_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, table)
    results.print_table(title, columns, table["runs"])
    print(f"written to {path}")


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG, in the first of several processes.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    if not is_first():
        return
    with translate_os_errors(path.parent):
        write_png(path, figure)


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """Returns mean ± sample standard deviation; "nan" if a value is missing.

    >>> mean_and_deviation([0.5, 0.7])
    '0.6000 ± 0.1414'
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "nan"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.4f} ± {deviation:.4f}"


def count_text(number: int, noun: str) -> str:
    """Returns a number of things, as text.

    >>> count_text(1, "epoch"), count_text(3, "epoch")
    ('1 epoch', '3 epochs')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
