"""The flags of what draws the pictures of the results."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which pictures to draw, and where."""

    only: str = ""
    """Regular expression; draws the pictures whose name it matches. Empty for all."""

    output_dir: Path | None = None
    """Directory of all pictures, instead of their places in the repository."""
