"""The flags of what draws the pictures of the results."""

import dataclasses
import re
from pathlib import Path

from experiments.harness.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which pictures to draw, and where."""

    only: str = ""
    """Regular expression; draws the pictures whose name it matches. Empty for all."""

    output_dir: Path | None = None
    """Directory of all pictures, instead of their places in the repository."""

    def __post_init__(self):
        try:
            re.compile(self.only)
        except re.error as error:
            raise ConfigError(
                f"--only is not a regular expression: {error}."
            ) from error
