"""The flags of the benchmark of convolutions."""

import dataclasses
from pathlib import Path

from experiments.harness.config import require_positive
from experiments.harness.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to time."""

    num_channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Channels, in and out."""

    batch_size: int = 32
    """Images in a batch."""

    image_size: int = 28
    """Height and width of the images."""

    num_rounds: int = 21
    """How often everything is timed."""

    seed: int = 0
    """Seed of values and orders."""

    output: Path | None = None
    """Result file; a name in experiments/results by default."""

    def __post_init__(self):
        require_positive(self, "batch_size", "image_size", "num_rounds")
        if not self.num_channels or min(self.num_channels) < 1:
            raise ConfigError(
                "--num-channels must be 1 or more, for one size or several, got "
                f"{self.num_channels}."
            )
