"""Flags that list names."""

from collections.abc import Iterable

from experiments.harness.errors import ConfigError


def parse_names(flag: str, text: str, known: Iterable[str]) -> list[str]:
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
        raise ConfigError(
            f"{flag} must be some of {', '.join(known)}, got {', '.join(unknown)!r}."
        )
    return names
