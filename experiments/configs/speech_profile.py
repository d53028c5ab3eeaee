"""The flags of the profile of the speech recognizer's step."""

import dataclasses
from pathlib import Path

from experiments.harness.config import require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to time."""

    num_seconds: float = 2.72
    """Length of the longest utterance."""

    batch_size: int = 32
    """Utterances in a batch."""

    num_rounds: int = 21
    """How often everything is timed."""

    seed: int = 0
    """Seed of values and orders."""

    output: Path | None = None
    """Result file; a name in experiments/results by default."""

    def __post_init__(self):
        require_positive(self, "num_seconds", "batch_size")
        require(self.num_rounds >= 2, "--num-rounds", "2 or more", self)
