"""The flags of the benchmark of recurrent layers."""

import dataclasses
from pathlib import Path

from experiments.harness.config import require_positive
from experiments.harness.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to time."""

    num_units: tuple[int, ...] = (96, 256)
    """Units of each direction."""

    length: int = 136
    """Steps of a sequence."""

    batch_size: int = 32
    """Sequences in a batch."""

    num_rounds: int = 21
    """How often everything is timed."""

    seed: int = 0
    """Seed of values and orders."""

    output: Path | None = None
    """Result file; a name in experiments/results by default."""

    def __post_init__(self):
        require_positive(self, "length", "batch_size", "num_rounds")
        if not self.num_units or min(self.num_units) < 1:
            raise ConfigError(
                "--num-units must be 1 or more, for one size or several, got "
                f"{self.num_units}."
            )
