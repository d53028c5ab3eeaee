"""Does half precision reach the float32 result? mnist_mlp over policies and seeds.

    python -m experiments.benchmarks.parity                    # 2 h on 2 CPU cores
    python -m experiments.benchmarks.parity --num-units 512    # 15 min
    python -m experiments.benchmarks.parity --num-units 512 --batch-size 256 \\
      --num-epochs 10

Trains `mnist_mlp` for every policy, loss scale and seed, and writes mean ± standard
deviation per cell. Started again, it goes on with the runs that are missing. Cells that
the result file holds, and this command does not ask for, stay in it.
"""

import dataclasses
import itertools
import statistics
from pathlib import Path
from typing import Any

import mpjax
from experiments import mnist_mlp
from experiments.data import mnist
from experiments.harness import cli, results
from experiments.harness.config import require_positive, split_policies
from experiments.harness.errors import ConfigError
from experiments.harness.files import read_json, translate_os_errors, write_json
from experiments.harness.loss_scales import split_loss_scales
from experiments.harness.results import Column
from experiments.harness.stop import Interrupted, StopRequest, on_signals

NAME = "mnist_mlp_parity"
COLUMNS = (
    Column("policy", "policy"),
    Column("loss scale", "loss_scale"),
    Column("seeds", "num_seeds"),
    Column("test accuracy", "test_accuracy"),
    Column("test loss", "test_loss"),
    Column("skipped steps", "num_skipped", "{:g}"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run; the defaults are the guide's network over five seeds."""

    policies: str = "float32,mixed_float16,mixed_bfloat16"
    """Precision policies, separated by commas."""

    loss_scales: str = "none,static:128,dynamic"
    """Loss scales, separated by commas."""

    num_seeds: int = 5
    """Seeds 0, 1, … per policy and loss scale."""

    autocast: bool = True
    """As in mnist_mlp."""

    num_units: int = 4096
    """As in mnist_mlp."""

    num_epochs: int = 5
    """As in mnist_mlp."""

    batch_size: int = 8192
    """As in mnist_mlp."""

    dataset: str = "mnist"
    """As in mnist_mlp."""

    workdir: Path = Path("runs/parity")
    """Where the runs are kept."""

    output: Path | None = None
    """The result file; a name in experiments/results by default."""

    def __post_init__(self):
        require_positive(self, "num_seeds", "num_units", "num_epochs", "batch_size")
        if not self.cells():
            raise ConfigError(
                "--policies and --loss-scales must name one each, or more."
            )
        for policy, loss_scale in self.cells():
            self.run_config(policy, loss_scale, seed=0)

    def cells(self) -> list[tuple[str, str]]:
        """Every policy with every loss scale."""
        lists = split_policies(self.policies), split_loss_scales(self.loss_scales)
        return list(dict.fromkeys(itertools.product(*lists)))

    def shape(self) -> str:
        """What tells one table from another."""
        shape = f"{self.num_units}x{self.batch_size}x{self.num_epochs}"
        suffix = "" if self.dataset == "mnist" else f"-{self.dataset}"
        return shape + suffix + ("" if self.autocast else "-cast")

    def run_config(
        self, policy: str, loss_scale: str, *, seed: int
    ) -> mnist_mlp.Config:
        """The settings of one run, which goes on where it has been begun."""
        cell = f"{policy}-{loss_scale}-{seed}".replace(":", "_").replace(" ", "")
        workdir = self.workdir / self.shape() / cell
        return mnist_mlp.Config(
            policy=policy,
            loss_scale=loss_scale,
            autocast=self.autocast,
            seed=seed,
            num_units=self.num_units,
            num_epochs=self.num_epochs,
            batch_size=self.batch_size,
            dataset=self.dataset,
            num_checkpoints=0,
            workdir=workdir,
            resume=(workdir / "config.json").exists(),
        )


def main(config: Config) -> dict[str, Any]:
    """Runs what is missing and writes the table; returns what the file holds.

    Raises:
      ExperimentError: of the kind that fits; the runs that are finished are kept.
      NonFiniteTrainingError: if the gradients of a run stay non-finite.
    """
    dataset = mnist.load(config.dataset)
    with on_signals() as stop:
        for seed in range(config.num_seeds):
            for policy, loss_scale in config.cells():
                run = config.run_config(policy, loss_scale, seed=seed)
                _run(run, dataset, stop)
    output = config.output or (
        Path(__file__).parents[1] / "results" / f"{NAME}_{config.shape()}.json"
    )
    cells = [_runs(config, policy, loss_scale) for policy, loss_scale in config.cells()]
    table = {
        "experiment": NAME,
        "dataset": config.dataset,
        "autocast": config.autocast,
        "num_units": config.num_units,
        "batch_size": config.batch_size,
        "num_epochs": config.num_epochs,
        "environment": results.environment(),
        "runs": _merge(output, [_aggregate(runs) for runs in cells]),
    }
    with translate_os_errors(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, table)
    results.print_table(f"parity, {config.shape()}", COLUMNS, table["runs"])
    print(f"written to {output}")
    return table


def _run(run: mnist_mlp.Config, dataset: mnist.ImageDataset, stop: StopRequest) -> None:
    kept = "the runs that are finished are kept"
    try:
        stop.check(kept)
        mnist_mlp.main(run, dataset)
    except Interrupted as error:
        raise Interrupted(error.signal_number, kept) from error


def _runs(config: Config, policy: str, loss_scale: str) -> list[dict[str, Any]]:
    """The result of each seed."""
    configs = (
        config.run_config(policy, loss_scale, seed=seed)
        for seed in range(config.num_seeds)
    )
    return [read_json(run.workdir / "result.json") for run in configs if run.workdir]


def _merge(output: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with those of an older file that are not made anew, sorted."""
    made = [(row["policy"], row["loss_scale"]) for row in rows]
    older = read_json(output)["runs"] if output.exists() else []
    rows = rows + [r for r in older if (r["policy"], r["loss_scale"]) not in made]
    policies = [*mpjax.PRESETS]

    def place(row):
        policy, loss_scale = row["policy"], row["loss_scale"]
        known = policies.index(policy) if policy in policies else len(policies)
        kinds = ("none", "static", "dynamic", "histogram")
        return known, policy, kinds.index(loss_scale.partition(":")[0]), loss_scale

    return sorted(rows, key=place)


def _made_by(cell: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The devices, versions and commits of a cell's runs, each once."""
    keys = ("device", "commit", "versions")
    made_by = []
    for result in cell:
        made = {key: result["environment"][key] for key in keys}
        if made not in made_by:
            made_by.append(made)
    return made_by


def _aggregate(cell: list[dict[str, Any]]) -> dict[str, Any]:
    runs = [run for result in cell for run in result["runs"]]
    accuracies = [run["test_accuracy"] for run in runs]
    losses = [run["test_loss"] for run in runs]
    return {
        "policy": runs[0]["policy"],
        "loss_scale": runs[0]["loss_scale"],
        "num_seeds": len(runs),
        "test_accuracy": _spread(accuracies),
        "test_loss": _spread(losses),
        "num_skipped": statistics.mean(run["num_skipped"] for run in runs),
        "test_accuracies": accuracies,
        "test_losses": losses,
        "made_by": _made_by(cell),
    }


def _spread(values: list[Any]) -> str:
    """Mean ± sample standard deviation; nan if a run has no number."""
    if None in values:
        return "nan"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    cli.run(main, Config, doc=__doc__)
