"""Test accuracy of `mnist_mlp` over policies, loss scales and seeds.

    python -m experiments.benchmarks.parity                    # 1.5 h on 2 CPU cores
    python -m experiments.benchmarks.parity --num-units 512    # 15 min
    python -m experiments.benchmarks.parity --num-units 512 --batch-size 256 \\
      --num-epochs 10

Does half precision reach the float32 result? Trains `mnist_mlp` for every policy, loss
scale and seed, and writes mean ± standard deviation over seeds, and the differences to
float32 without loss scaling, paired by seed, with their 95 % intervals. Started again,
it trains only what is missing. Rows of the result file that this command does not ask
for stay in it.
"""

from experiments.configs.parity import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.benchmarks.parity", Config, doc=__doc__)

import statistics
from pathlib import Path
from typing import Any

import mpjax
from experiments import mnist_mlp
from experiments.data import mnist
from experiments.harness import results
from experiments.harness.files import read_json
from experiments.harness.intervals import compare_by_seed
from experiments.harness.output import RESULTS, mean_and_deviation, save_table
from experiments.harness.results import Column
from experiments.harness.stop import Interrupted, StopRequest, on_signals

NAME = "parity"
COLUMNS = (
    Column("policy", "policy"),
    Column("loss scale", "loss_scale"),
    Column("seeds", "num_seeds"),
    Column("test accuracy", "test_accuracy"),
    Column("points to float32", "difference"),
    Column("test loss", "test_loss"),
    Column("skipped steps", "num_skipped", "{:g}"),
)


def main(config: Config) -> dict[str, Any]:
    """Trains what is missing, and writes the table.

    Returns:
      What the result file holds.

    Raises:
      ExperimentError: if a run fails or is interrupted; finished runs are kept.
      NonFiniteTrainingError: if the gradients of a run stay non-finite.
    """
    dataset = mnist.load(config.dataset)
    with on_signals() as stop:
        for seed in range(config.num_seeds):
            for policy, loss_scale in config.cells():
                run = config.run_config(policy, loss_scale, seed=seed)
                _run(run, dataset, stop)
    output = config.output or RESULTS / f"{NAME}_{config.shape()}.json"
    cells = [_runs(config, policy, loss_scale) for policy, loss_scale in config.cells()]
    table = {
        "experiment": NAME,
        "dataset": config.dataset,
        "autocast": config.autocast,
        "num_units": config.num_units,
        "batch_size": config.batch_size,
        "num_epochs": config.num_epochs,
        "environment": results.environment(),
        "runs": compared(_merge(output, [_aggregate(runs) for runs in cells])),
    }
    save_table(output, table, f"parity, {config.shape()}", COLUMNS)
    return table


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows with their differences to float32 without loss scaling.

    Args:
      rows: rows with `policy`, `loss_scale` and `test_accuracies`, one per seed.

    Returns:
      The rows with `difference`, as text in points with its 95 % interval, and
      `difference_interval`, as numbers; both None for float32 itself, and where it has
      no row. Only seeds of both are compared.
    """
    float32 = {
        seed: accuracy
        for row in rows
        if _is_baseline(row)
        for seed, accuracy in enumerate(row["test_accuracies"])
    }
    keys = ("difference", "difference_interval")
    compared = []
    for row in rows:
        accuracies = dict(enumerate(row["test_accuracies"]))
        found = compare_by_seed({} if _is_baseline(row) else accuracies, float32)
        compared.append(row | {key: found[key] for key in keys})
    return compared


def _is_baseline(row: dict[str, Any]) -> bool:
    return (row["policy"], row["loss_scale"]) == ("float32", "none")


def _run(run: mnist_mlp.Config, dataset: mnist.ImageDataset, stop: StopRequest) -> None:
    kept = "the runs that are finished are kept"
    try:
        stop.check(kept)
        mnist_mlp.main(run, dataset)
    except Interrupted as error:
        raise Interrupted(error.signal_number, kept) from error


def _runs(config: Config, policy: str, loss_scale: str) -> list[dict[str, Any]]:
    """Returns the result of each seed."""
    configs = (
        config.run_config(policy, loss_scale, seed=seed)
        for seed in range(config.num_seeds)
    )
    return [read_json(run.workdir / "result.json") for run in configs if run.workdir]


def _merge(output: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows and those of an older file that they do not replace, sorted."""
    made = [(row["policy"], row["loss_scale"]) for row in rows]
    older = read_json(output)["runs"] if output.exists() else []
    rows = rows + [r for r in older if (r["policy"], r["loss_scale"]) not in made]
    policies = [*mpjax.PRESETS]

    def sort_key(row):
        policy, loss_scale = row["policy"], row["loss_scale"]
        known = policies.index(policy) if policy in policies else len(policies)
        kinds = ("none", "static", "dynamic", "histogram")
        return known, policy, kinds.index(loss_scale.partition(":")[0]), loss_scale

    return sorted(rows, key=sort_key)


def _made_by(cell: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns devices, versions and commits of a cell's runs, without repetitions."""
    keys = ("device", "commit", "versions")
    made_by = []
    for result in cell:
        made = {key: result["environment"][key] for key in keys}
        if made not in made_by:
            made_by.append(made)
    return made_by


def _aggregate(cell: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row of a policy and loss scale, from the results of its seeds."""
    runs = [run for result in cell for run in result["runs"]]
    accuracies = [run["test_accuracy"] for run in runs]
    losses = [run["test_loss"] for run in runs]
    return {
        "policy": runs[0]["policy"],
        "loss_scale": runs[0]["loss_scale"],
        "num_seeds": len(runs),
        "test_accuracy": mean_and_deviation(accuracies),
        "test_loss": mean_and_deviation(losses),
        "num_skipped": statistics.mean(run["num_skipped"] for run in runs),
        "test_accuracies": accuracies,
        "test_losses": losses,
        "made_by": _made_by(cell),
    }
