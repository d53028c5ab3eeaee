"""The flags of the tables of README.md and docs/."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to do with the pages."""

    check: bool = False
    """Change nothing; exit with 1 and name the tables that are out of date."""
