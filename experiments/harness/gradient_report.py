"""Writes what a run's activation gradients are, beside its other results."""

from typing import Any

from experiments.harness.files import translate_os_errors, write_json
from experiments.harness.gradient_plots import gradients_figure
from experiments.harness.gradient_summary import COLUMNS, summarize_gradients
from experiments.harness.plot_style import write_png
from experiments.harness.recorder import read_rows
from experiments.harness.results import Result, print_table


def report_gradients(name: str, result: Result, title: str) -> None:
    """Writes gradients.json and gradients.png of each policy, and prints the tables.

    Args:
      name: of the experiment, in the files.
      result: of all policies, which counted exponents.
      title: title of tables and pictures.

    Raises:
      WorkdirError: if a file cannot be written.
    """
    for run in result.runs:
        directory = result.workdir / run["policy"]
        text = f"{title}, {run['policy']}"
        rows = read_rows(directory / "metrics.jsonl")
        table = gradients_table(name, text, result.environment, rows)
        with translate_os_errors(directory):
            write_json(directory / "gradients.json", table)
            write_png(directory / "gradients.png", gradients_figure(text, table))
        print_table(f"activation gradients, {text}", COLUMNS, table["runs"])
        print(table["advice"])


def gradients_table(
    name: str, title: str, environment: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns a result file of activation gradients; see `summarize_gradients`."""
    facts = {"experiment": name, "title": title, "environment": environment}
    return {**facts, **summarize_gradients(rows)}
