"""The flags of the table of parity."""

import dataclasses
import itertools
from pathlib import Path

from experiments.configs import mnist_mlp
from experiments.data.mnist_config import check_dataset
from experiments.harness.config import check_policy, require_positive, split_policies
from experiments.harness.errors import ConfigError
from experiments.harness.flags import split_loss_scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to train; the defaults are the Keras guide's network over five seeds."""

    policies: str = "float32,mixed_float16,mixed_bfloat16"
    """Comma-separated precision policies."""

    loss_scales: str = "none,static:128,dynamic"
    """Comma-separated loss scales."""

    num_seeds: int = 5
    """Runs per policy and loss scale; their seeds are 0, 1, …"""

    autocast: bool = True
    """How a mixed policy is applied: --autocast runs matmuls in half and sensitive ops
    in float32, --no-autocast casts parameters and inputs to half."""

    num_units: int = 4096
    """Units in each of the two hidden layers."""

    num_epochs: int = 5
    """Passes over the training set."""

    batch_size: int = 8192
    """Examples per step."""

    dataset: str = "mnist"
    """Images to train on: mnist, or digits (scikit-learn's, offline)."""

    workdir: Path = Path("runs/parity")
    """Directory that keeps the runs, so that they are not repeated."""

    output: Path | None = None
    """Result file; a name in experiments/results by default."""

    def __post_init__(self):
        require_positive(self, "num_seeds", "num_units", "num_epochs", "batch_size")
        if not self.cells():
            raise ConfigError(
                "--policies and --loss-scales must each name at least one."
            )
        for policy in split_policies(self.policies):
            check_policy("--policies", policy)
        check_dataset(self.dataset)
        for policy, loss_scale in self.cells():
            self.run_config(policy, loss_scale, seed=0)

    def cells(self) -> list[tuple[str, str]]:
        """Returns every policy with every loss scale."""
        lists = split_policies(self.policies), split_loss_scales(self.loss_scales)
        return list(dict.fromkeys(itertools.product(*lists)))

    def shape(self) -> str:
        """Returns what distinguishes one table from another, for file names."""
        shape = f"{self.num_units}x{self.batch_size}x{self.num_epochs}"
        suffix = "" if self.dataset == "mnist" else f"-{self.dataset}"
        return shape + suffix + ("" if self.autocast else "-cast")

    def run_config(
        self, policy: str, loss_scale: str, *, seed: int
    ) -> mnist_mlp.Config:
        """Returns the settings of one run, which resumes if it was begun before."""
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
