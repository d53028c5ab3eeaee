"""The flags of every experiment on MNIST."""

import dataclasses
from pathlib import Path

from experiments.data import mnist
from experiments.harness.config import BaseConfig
from experiments.harness.errors import ConfigError


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
        if self.dataset not in mnist.DATASETS:
            raise ConfigError(
                f"--dataset must be one of {', '.join(mnist.DATASETS)}, "
                f"got {self.dataset!r}."
            )

    def load_dataset(self) -> mnist.ImageDataset:
        """Returns the data set that the flags name; see `mnist.load`."""
        return mnist.load(self.dataset, self.data_dir)
