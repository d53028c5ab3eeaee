"""The flags of the benchmark of loss scales."""

import dataclasses
from pathlib import Path

from experiments.data.mnist_config import check_dataset
from experiments.harness.config import check_loss_scales, require_positive
from experiments.harness.flags import parse_names, split_loss_scales

NETWORKS = ("mlp", "gru")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to train."""

    networks: str = "mlp,gru"
    """Comma-separated networks: mlp, gru."""

    loss_scales: str = (
        "none,static:2**10,dynamic,histogram,"
        "dynamic:1,histogram:1,dynamic:2**24,histogram:2**24"
    )
    """Comma-separated loss scales."""

    num_steps: int = 150
    """Steps per run, skipped ones included."""

    num_seeds: int = 3
    """Runs per loss scale; their seeds, for parameters and shuffling, are 0, 1, …"""

    sample_every: int = 20
    """Steps from one comparison with the float32 gradient to the next."""

    num_rounds: int = 31
    """How often each step is timed."""

    dataset: str = "mnist"
    """Images to train on: mnist, or digits (scikit-learn's, offline)."""

    output: Path | None = None
    """Result file; a plot goes beside it. A name in experiments/results by default."""

    def __post_init__(self):
        names = ("num_steps", "num_seeds", "sample_every", "num_rounds")
        require_positive(self, *names)
        check_dataset(self.dataset)
        self.network_names()
        check_loss_scales("--loss-scales", split_loss_scales(self.loss_scales))

    def network_names(self) -> list[str]:
        """Returns the networks to train.

        Raises:
          ConfigError: if one of them is unknown.
        """
        return parse_names("--networks", self.networks, NETWORKS)
