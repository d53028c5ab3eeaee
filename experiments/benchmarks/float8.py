"""Training in float8 beside bfloat16 and float32, paired by seed.

    python -m experiments.benchmarks.float8                # 80 min of one CPU core
    python -m experiments.benchmarks.float8 --tasks mlp    # 10 min

Three small networks: the Keras guide's MLP on MNIST, a causal transformer on the bytes
of Python's standard library, and the Conformer of `speech_ctc` on synthesised Mandarin.
They are too small for float8 to pay, so that `mixed_float8` would train them in
bfloat16; `mixed_float8:all` puts all their matmuls in float8, and a rule keeps the
first and the last layer in bfloat16. Every precision has the same initial parameters
and data, so that a seed's runs are a pair. Tests are in float32, of the weights that
the precision trained.

Each run is kept as soon as it ends, in a file beside the result; the same command
continues after an interruption with the runs that are missing, and then removes it.
"""

from experiments.configs.float8 import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.benchmarks.float8", Config, doc=__doc__)

import dataclasses
import statistics
import warnings
from typing import Any

import jax

from experiments.benchmarks._float8_tasks import BFLOAT16, FLOAT32, TASKS
from experiments.benchmarks.loss_curves import KeptRuns, train_task
from experiments.harness import results
from experiments.harness.intervals import interval_text, mean_interval
from experiments.harness.output import RESULTS, save_table
from experiments.harness.results import Column

NAME = "float8"
REFERENCES = {"float32": FLOAT32, "bfloat16": BFLOAT16}


def _interval(form: str) -> Any:
    return lambda interval: interval_text(interval, form)


COLUMNS = (
    Column("task", "task"),
    Column("precision", "precision"),
    Column("test loss", "test_loss", "{:.4f}"),
    Column("minus float32", "loss_minus_float32", _interval("{:+.4f}")),
    Column("minus bfloat16", "loss_minus_bfloat16", _interval("{:+.4f}")),
    Column("test error", "test_error", "{:.2%}"),
    Column("points to float32", "error_minus_float32", _interval("{:+.2f}")),
    Column("points to bfloat16", "error_minus_bfloat16", _interval("{:+.2f}")),
    Column("skipped steps", "num_skipped"),
)


def main(config: Config) -> dict[str, Any]:
    """Trains what is missing, and writes the table.

    Returns:
      What the result file holds.

    Raises:
      DataError: if the data are unavailable.
      WorkdirError: if the result cannot be written.
    """
    environment = results.environment()
    machine = environment["machine"]
    output = config.output or RESULTS / f"{NAME}_{machine}_jax{jax.__version__}.json"
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "output"}
    kept = KeptRuns(output.with_suffix(".runs"), settings, environment["commit"])
    rows, facts = [], {}
    with warnings.catch_warnings():
        # A CPU multiplies the same numbers in a wider format, as is meant here.
        warnings.filterwarnings("ignore", message="mixed_float8:")
        for name in config.task_names():
            task = TASKS[name](config)
            facts[name] = {"num_steps": task.num_steps, **task.facts}
            runs = train_task(task, config.num_seeds, 1, kept)
            rows += [{"task": task.title, **row} for row in _aggregate(runs)]
    table = {
        "experiment": NAME,
        **settings,
        "data": facts,
        "commits": kept.commits(),
        "environment": environment,
        "runs": rows,
    }
    save_table(output, table, f"training in float8, {machine}", COLUMNS)
    kept.remove()
    return table


def _aggregate(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns a row per precision; differences to others are paired by seed."""
    tests = {name: [run["tests"][-1] for run in own] for name, own in runs.items()}
    rows = []
    for name, own in tests.items():
        row: dict[str, Any] = {
            "precision": name,
            "num_skipped": sum(run["num_skipped"] for run in runs[name]),
        }
        for metric, plural, factor in (("loss", "losses", 1), ("error", "errors", 100)):
            if metric not in own[0]:
                continue
            values = [test[metric] for test in own]
            row[f"test_{plural}"] = values
            row[f"test_{metric}"] = statistics.mean(values)
            for short, reference in REFERENCES.items():
                if name in (FLOAT32, reference):
                    continue
                others = [test[metric] for test in tests[reference]]
                pairs = zip(values, others, strict=True)
                differences = [factor * (value - other) for value, other in pairs]
                row[f"{metric}_minus_{short}"] = mean_interval(differences)
        rows.append(row)
    return rows
