"""The flags of the Keras guide on MNIST."""

import dataclasses
from typing import ClassVar

from experiments.data.mnist_config import MnistConfig
from experiments.harness.config import require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MnistConfig):
    """Settings of the experiment; the defaults are the guide's."""

    EXTENSIBLE: ClassVar[tuple[str, ...]] = ("num_epochs",)
    SCHEDULE_SPANS_RUN: ClassVar[bool] = False

    num_units: int = 4096
    """Units in each of the two hidden layers."""

    num_epochs: int = 5
    """Passes over the training set. With --resume there can be more than before: the
    run goes on past its old end."""

    batch_size: int = 8192
    """Examples per step; the last batch of an epoch is smaller."""

    learning_rate: float = 1e-3
    """RMSprop learning rate."""

    validation_split: float = 0.2
    """Share of the training set, at its end, that is held out for validation."""

    numerics: bool = False
    """Count the exponents of every matmul's results, forward and backward, and draw
    them in numerics.png, from numerics.json."""

    numerics_interval: int = 5
    """With --numerics: steps from one count to the next."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        super().__post_init__()
        require_positive(self, "num_units", "num_epochs", "batch_size", "learning_rate")
        require_positive(self, "numerics_interval")
        share = self.validation_split
        require(0 < share < 1, "--validation-split", "between 0 and 1", self)
