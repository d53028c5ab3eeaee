"""The flags of DeepConvNet on MNIST."""

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

from experiments.data.mnist_config import MnistConfig
from experiments.harness.config import require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.flags import parse_names, require_file

PRECISIONS = (
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MnistConfig):
    """Settings of the experiment."""

    EXTENSIBLE: ClassVar[tuple[str, ...]] = ("num_epochs",)

    policies: str = "float32,mixed_float16,mixed_bfloat16"
    """Precision policies to train in, separated by commas; the same seed in each."""

    precisions: str = ",".join(PRECISIONS)
    """Precisions to evaluate the trained weights in, separated by commas. If float64 is
    among them, the others are compared with it."""

    num_epochs: int = 10
    """Passes over the training set. With --resume there can be more than before: the
    run goes on past its old end."""

    batch_size: int = 128
    """Examples per step; the last batch of an epoch may be smaller."""

    learning_rate: float = 2e-3
    """Largest learning rate of Adam, reached after the warm-up. The schedule ends with
    the run: where --resume and more epochs extend it, the steps that are left take the
    learning rates of the longer schedule."""

    num_val: int = 1000
    """Number of training images, the last ones, held out for validation."""

    export: Path | None = None
    """File to which the weights trained in the first policy are also written, as
    safetensors."""

    load: Path | None = None
    """Safetensors file whose weights are evaluated; nothing is trained or written."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        super().__post_init__()
        require_positive(self, "num_epochs", "batch_size", "learning_rate", "num_val")
        self.precision_names()
        if self.load is not None:
            for flag in ("export", "workdir"):
                if getattr(self, flag) is not None:
                    raise ConfigError(
                        f"--load evaluates and writes nothing; leave --{flag} out."
                    )
        if self.export is not None:
            _check_target(self.export)

    def check_paths(self, experiment: str) -> None:
        super().check_paths(experiment)
        if self.load is not None:
            require_file("--load", self.load)

    def precision_names(self) -> tuple[str, ...]:
        """Returns the precisions to evaluate in, in order, each once."""
        names = parse_names("--precisions", self.precisions, PRECISIONS)
        return tuple(dict.fromkeys(names))

    def comparable(self) -> dict[str, Any]:
        """Returns the settings to compare, without the files of weights."""
        values = super().comparable()
        return {k: v for k, v in values.items() if k not in ("export", "load")}


def _check_target(path: Path) -> None:
    """Raises ConfigError, before the training, where --export cannot be written."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"--export: cannot write {path}; expected a file in a directory "
            "that exists and can be written."
        )
