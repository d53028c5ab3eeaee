"""The flags of every experiment on MNIST."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.harness.config import BaseConfig
from experiments.harness.errors import ConfigError
from experiments.harness.flags import did_you_mean

if TYPE_CHECKING:
    from experiments.data.mnist import ImageDataset

DATASETS = ("mnist", "digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MnistConfig(BaseConfig):
    """Settings of an experiment on MNIST."""

    dataset: str = "mnist"
    """mnist, or digits: the 1797 small digits of scikit-learn, which need no network
    and are much easier: not a substitute for MNIST."""

    data_dir: Path | None = None
    """TFDS directory to read MNIST from; by default the cache, then every source."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        super().__post_init__()
        check_dataset(self.dataset)

    def load_dataset(self) -> "ImageDataset":
        """Returns the data set that the flags name; see `mnist.load`."""
        from experiments.data import mnist

        return mnist.load(self.dataset, self.data_dir)


def check_dataset(name: str) -> None:
    """Checks the value of --dataset.

    Raises:
      ConfigError: if there is no such data set.
    """
    if name not in DATASETS:
        raise ConfigError(
            f"--dataset must be one of {', '.join(DATASETS)}, got {name!r}."
            f"{did_you_mean(name, DATASETS)}"
        )
