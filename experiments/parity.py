"""Does half precision reach the float32 result? mnist_mlp over policies and seeds.

    python -m experiments.parity                      # 4096 units; 2 h on 2 CPU cores
    python -m experiments.parity --num-units 512      # 15 min
    python -m experiments.parity --num-units 512 --batch-size 256 --num-epochs 10

Trains `mnist_mlp` for every policy, loss scale and seed, and writes mean ± standard
deviation per cell. Stopped and started again, it goes on with the runs that are missing.
"""

import dataclasses
import itertools
import statistics
from pathlib import Path
from typing import Any

from experiments import mnist_mlp
from experiments.data import mnist
from experiments.errors import ConfigError
from experiments.harness import cli, results
from experiments.harness.config import require_positive
from experiments.harness.results import Column
from experiments.harness.workdir import read_json, write_json

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

    num_units: int = 4096
    """As in mnist_mlp."""

    num_epochs: int = 5
    """As in mnist_mlp."""

    batch_size: int = 8192
    """As in mnist_mlp."""

    workdir: Path = Path("runs/parity")
    """Where the runs are kept."""

    output: Path | None = None
    """The result file; a name in experiments/results by default."""

    def __post_init__(self):
        require_positive(self, "num_seeds", "num_units", "num_epochs", "batch_size")
        for policy, loss_scale in self.cells():
            try:
                mnist_mlp.Config(policy=policy, loss_scale=loss_scale)
            except ConfigError as error:
                raise ConfigError(f"--policies or --loss-scales: {error}") from error

    def cells(self) -> list[tuple[str, str]]:
        """Every policy with every loss scale."""
        lists = (self.policies.split(","), self.loss_scales.split(","))
        return list(itertools.product(*lists))

    def shape(self) -> str:
        """What tells one table from another."""
        return f"{self.num_units}x{self.batch_size}x{self.num_epochs}"


def main(config: Config) -> dict[str, Any]:
    """Runs what is missing and writes the table; returns what the file holds."""
    dataset = mnist.load()
    for seed in range(config.num_seeds):
        for policy, loss_scale in config.cells():
            run = mnist_mlp.Config(
                policy=policy,
                loss_scale=loss_scale,
                seed=seed,
                num_units=config.num_units,
                num_epochs=config.num_epochs,
                batch_size=config.batch_size,
                num_checkpoints=0,
                workdir=_directory(config, policy, loss_scale, seed),
                resume=_directory(config, policy, loss_scale, seed).exists(),
            )
            mnist_mlp.main(run, dataset)
    runs = [
        _aggregate(config, policy, loss_scale) for policy, loss_scale in config.cells()
    ]
    table = {
        "experiment": NAME,
        "num_units": config.num_units,
        "batch_size": config.batch_size,
        "num_epochs": config.num_epochs,
        "environment": results.environment(),
        "runs": runs,
    }
    output = config.output or (
        Path(__file__).parent / "results" / f"{NAME}_{config.shape()}.json"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, table)
    results.print_table(f"parity, {config.shape()}", COLUMNS, runs)
    return table


def _directory(config: Config, policy: str, loss_scale: str, seed: int) -> Path:
    cell = f"{policy}-{loss_scale}-{seed}".replace(":", "_")
    return config.workdir / config.shape() / cell


def _aggregate(config: Config, policy: str, loss_scale: str) -> dict[str, Any]:
    runs = [
        read_json(_directory(config, policy, loss_scale, seed) / "result.json")
        for seed in range(config.num_seeds)
    ]
    runs = [run for result in runs for run in result["runs"]]
    return {
        "policy": policy,
        "loss_scale": loss_scale,
        "num_seeds": len(runs),
        "test_accuracy": _spread([run["test_accuracy"] for run in runs]),
        "test_loss": _spread([run["test_loss"] for run in runs]),
        "num_skipped": statistics.mean(run["num_skipped"] for run in runs),
        "test_accuracies": [run["test_accuracy"] for run in runs],
        "test_losses": [run["test_loss"] for run in runs],
    }


def _spread(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    cli.run(main, Config, doc=__doc__)
