"""Flags that list names, or name files."""

import difflib
import os
import re
from collections.abc import Collection
from pathlib import Path

from experiments.harness.errors import ConfigError, DataError


def parse_names(flag: str, text: str, known: Collection[str]) -> list[str]:
    """Splits a flag's value at commas.

    Args:
      flag: as it is typed, for the error.
      text: names with commas between them.
      known: the names that exist.

    Raises:
      ConfigError: if the text names nothing, or a name that does not exist.

    >>> parse_names("--networks", "mlp, gru", ["gru", "mlp"])
    ['mlp', 'gru']
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        hint = did_you_mean(unknown[0], known) if unknown else ""
        raise ConfigError(
            f"{flag} must be some of {', '.join(known)}, got "
            f"{(', '.join(unknown) or text)!r}."
            f"{hint}"
        )
    return names


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Returns a sentence, after a space, that names what is spelt alike; or nothing.

    >>> did_you_mean("flaot16", ["float16", "float32"])
    " Did you mean 'float16'?"
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def require_file(flag: str, path: Path) -> None:
    """Raises DataError unless a flag's path is that of a file."""
    name = os.path.expanduser(path)
    if not os.path.isfile(name):
        found = "a directory" if os.path.isdir(name) else "nothing that can be read"
        raise DataError(f"{flag} must name a file, and {path} is {found}.")


def require_directory(flag: str, path: Path) -> None:
    """Raises DataError unless a flag's path is that of a directory."""
    name = os.path.expanduser(path)
    if not os.path.isdir(name):
        found = "a file" if os.path.isfile(name) else "nothing that can be read"
        raise DataError(f"{flag} must name a directory, and {path} is {found}.")


def split_loss_scales(text: str) -> list[str]:
    """Splits at commas, except before a setting, as in `dynamic,growth_interval=9`.

    >>> split_loss_scales("none, dynamic:8,growth_interval=9")
    ['none', 'dynamic:8,growth_interval=9']
    """
    pieces = re.split(r",(?![^,]*=)", text)
    return [piece.strip() for piece in pieces if piece.strip()]
