"""The settings of digits placed on a canvas."""

import dataclasses
from typing import Literal

from experiments.harness.errors import ConfigError

Difficulty = Literal["easy", "medium", "hard"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Settings that determine every pixel of the scenes."""

    seed: int = 0
    """Seed of digits, sizes, places, clutter and noise."""

    num_train: int = 6000
    """Scenes for training."""

    num_test: int = 1000
    """Scenes for the test, of digits that no other scene has."""

    max_digits: int = 3
    """Digits of a scene: from 1 to this many."""

    min_scale: float = 0.7
    """Size of the smallest digit; at 1 it is that of MNIST, 28 pixels with its margin,
    on a canvas of 64, and as large a share of others."""

    max_scale: float = 1.3
    """Size of the largest digit."""

    difficulty: Difficulty = "medium"
    """easy: digits apart, on black. medium: they may overlap a little, with noise,
    pieces of other digits, and faint digits among them. hard: more of all."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        checks = {
            "seed": (self.seed >= 0, "0 or more"),
            "num_train": (self.num_train > 0, "1 or more"),
            "num_test": (self.num_test > 0, "1 or more"),
            "max_digits": (self.max_digits > 0, "1 or more"),
            "max_scale": (
                0.3 <= self.min_scale <= self.max_scale <= 2,
                "--scenes.min-scale or more, both from 0.3 to 2",
            ),
        }
        for name, (is_valid, expected) in checks.items():
            if not is_valid:
                flag = f"--scenes.{name.replace('_', '-')}"
                value = getattr(self, name)
                raise ConfigError(f"{flag} must be {expected}, got {value!r}.")
