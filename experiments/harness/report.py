"""The tables and plots that end a comparison of policies."""

from collections.abc import Sequence
from typing import Any

from experiments.harness.experiment import Experiment
from experiments.harness.files import translate_os_errors, write_json, write_text
from experiments.harness.numerics_plots import numerics_figure
from experiments.harness.numerics_summary import summarize
from experiments.harness.plot_style import write_png
from experiments.harness.plots import training_figure
from experiments.harness.recorder import read_rows
from experiments.harness.results import Column, Result, markdown_table, print_table

# A title, columns and rows.
Table = tuple[str, Sequence[Column], list[dict[str, Any]]]


def report(
    experiment: Experiment, result: Result, title: str, *more_tables: Table
) -> None:
    """Writes plots and tables into the working directory, and prints the tables.

    Args:
      experiment: names the metrics and the columns.
      result: the result of all policies.
      title: title of the table of runs and of the plots.
      more_tables: further tables, shown below that of the runs.

    Raises:
      WorkdirError: if the directory cannot be written.
    """
    workdir = result.workdir
    tables: list[Table] = [(title, experiment.columns(), result.runs), *more_tables]
    texts = [markdown_table(columns, rows) for _, columns, rows in tables]
    metrics = {
        run["policy"]: read_rows(workdir / run["policy"] / "metrics.jsonl")
        for run in result.runs
    }
    headline = experiment.headline_metric()
    with translate_os_errors(workdir):
        figure = training_figure(title, metrics, headline)
        write_png(workdir / "training.png", figure)
        for policy, rows in metrics.items():
            if any(row["kind"] == "numerics" for row in rows):
                _report_numerics(result, policy, f"{title}, {policy}", rows)
        write_text(workdir / "result.md", "\n".join((title + "\n", *texts)))
    for table in tables:
        print_table(*table)
    print(f"metrics, plots and checkpoints: {workdir}")


def _report_numerics(
    result: Result, policy: str, title: str, rows: list[dict[str, Any]]
) -> None:
    """Writes what was counted in one policy, as a table and as a plot."""
    table = {
        "experiment": f"{result.experiment}_numerics",
        "title": title,
        "environment": result.environment,
        "runs": summarize(rows),
    }
    path = result.workdir / policy / "numerics.json"
    write_json(path, table)
    write_png(path.with_suffix(".png"), numerics_figure(title, table["runs"]))
