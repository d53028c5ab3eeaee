"""The flags of Mandarin speech recognition by CTC."""

import dataclasses
from typing import ClassVar, Literal

from experiments.configs.recognizer import RecognizerConfig
from experiments.harness.config import require, require_positive
from experiments.harness.errors import ConfigError

Optimizer = Literal["adam", "nesterov"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RecognizerConfig):
    """Settings of the experiment."""

    EXTENSIBLE: ClassVar[tuple[str, ...]] = ("num_epochs",)

    policies: str = "float32,mixed_float16,mixed_bfloat16"
    """Precision policies to train in, separated by commas; the same seed in each."""

    num_epochs: int = 3
    """Passes over the training set. With --resume there can be more than before: the
    run goes on past its old end."""

    batch_size: int = 32
    """Utterances per step."""

    num_microbatches: int = 1
    """Parts of a batch whose gradients are added up; an utterance weighs the same."""

    optimizer: Optimizer = "adam"
    """adam, or nesterov: SGD with Nesterov momentum, the paper's."""

    momentum: float = 0.9
    """Momentum of nesterov."""

    learning_rate: float = 2e-3
    """Largest learning rate; it rises for a tenth of the steps, then falls to 0. Where
    --resume and more epochs extend a run, the steps that are left take the learning
    rates of the longer schedule."""

    max_grad_norm: float = 5.0
    """Gradients of a larger norm are scaled down to it."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        super().__post_init__()
        require_positive(self, "num_epochs", "batch_size", "num_microbatches")
        require_positive(self, "learning_rate", "max_grad_norm")
        require(0 <= self.momentum < 1, "--momentum", "from 0 to less than 1", self)
        if self.batch_size % self.num_microbatches:
            raise ConfigError(
                f"--num-microbatches {self.num_microbatches} must divide --batch-size "
                f"{self.batch_size}."
            )
