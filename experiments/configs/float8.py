"""The flags of the benchmark of training in float8."""

import dataclasses
from pathlib import Path

from experiments.data.mnist_config import check_dataset
from experiments.harness.config import require_positive
from experiments.harness.flags import parse_names

TASKS = ("mlp", "transformer", "conformer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to train."""

    tasks: str = ",".join(TASKS)
    """Comma-separated tasks: mlp, transformer, conformer."""

    num_seeds: int = 3
    """Runs per task and precision; their seeds, for parameters and data, are 0, 1, …"""

    num_units: int = 512
    """Units in each of the two hidden layers of the MLP."""

    mlp_batch_size: int = 256
    """Images per step of the MLP."""

    mlp_epochs: int = 10
    """Passes of the MLP over its images."""

    num_steps: int = 300
    """Steps of a transformer run."""

    batch_size: int = 16
    """Windows of 128 bytes per step of the transformer."""

    width: int = 128
    """Units of a token in the transformer; a multiple of 32, which a head has."""

    num_layers: int = 4
    """Layers of the transformer."""

    num_utterances: int = 3200
    """Utterances that the Conformer is trained on."""

    conformer_batch_size: int = 32
    """Utterances per step of the Conformer."""

    conformer_epochs: int = 4
    """Passes of the Conformer over them."""

    dataset: str = "mnist"
    """Images of the MLP: mnist, or digits (scikit-learn's, offline)."""

    output: Path | None = None
    """Result file; a name in experiments/results by default."""

    def __post_init__(self):
        numbers = [f.name for f in dataclasses.fields(self) if f.type is int]
        require_positive(self, *numbers)
        check_dataset(self.dataset)
        self.task_names()

    def task_names(self) -> list[str]:
        """Returns the tasks to train.

        Raises:
          ConfigError: if one of them is unknown.
        """
        return parse_names("--tasks", self.tasks, TASKS)
