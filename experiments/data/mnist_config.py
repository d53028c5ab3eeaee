"""The flags of every experiment on MNIST."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.harness.config import BaseConfig
from experiments.harness.errors import ConfigError, DataError
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

    def check_paths(self, experiment: str) -> None:
        """Checks --data-dir too; see `BaseConfig.check_paths`."""
        super().check_paths(experiment)
        if self.data_dir is not None and self.dataset == "mnist":
            check_data_dir(Path(os.path.expanduser(self.data_dir)))

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


def check_data_dir(path: Path) -> None:
    """Checks the value of --data-dir.

    Raises:
      DataError: if there is no such directory.
    """
    if not os.path.isdir(path) or not os.access(path, os.R_OK | os.X_OK):
        raise DataError(
            f"--data-dir {path} is not a directory that can be read; give a TFDS "
            "directory (it holds mnist/3.0.1), or leave the flag out."
        )
