"""The flags of the benchmark of losses and accuracy."""

import dataclasses
from pathlib import Path

from experiments.data.mnist_config import check_dataset
from experiments.harness.config import require_positive
from experiments.harness.flags import parse_names

TASKS = ("transformer", "convnet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to train."""

    tasks: str = "transformer,convnet"
    """Comma-separated tasks: transformer, convnet."""

    num_seeds: int = 3
    """Runs per task and precision; their seeds, for parameters and data, are 0, 1, …"""

    num_steps: int = 600
    """Steps of a transformer run."""

    width: int = 128
    """Units of a token in the transformer; a multiple of 32, which a head has."""

    num_layers: int = 6
    """Layers of the transformer."""

    length: int = 128
    """Bytes that the transformer sees."""

    batch_size: int = 16
    """Windows of so many bytes per step of the transformer."""

    num_epochs: int = 3
    """Passes of the convnet over its images."""

    num_images: int = 59_000
    """Training images of the convnet, the first ones; not all of them."""

    num_evals: int = 6
    """How often a run is tested, the last time at its end."""

    dataset: str = "mnist"
    """Images of the convnet: mnist, or digits (scikit-learn's, offline)."""

    output: Path | None = None
    """Result file; a plot goes beside it. A name in experiments/results by default."""

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
