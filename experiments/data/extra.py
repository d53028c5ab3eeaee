"""The libraries of an optional extra, imported when they are first needed."""

import importlib
from types import ModuleType

from experiments.harness.errors import DataError, first_line


def install_command(extra: str) -> str:
    """Returns the command that installs an extra of pyproject.toml."""
    return f'pip install -e ".[{extra}]"'


def import_extra(name: str, *, extra: str) -> ModuleType:
    """Returns a library that an extra installs.

    Args:
      name: full name of the module.
      extra: the extra in pyproject.toml, such as "speech".

    Raises:
      DataError: if it is not installed or cannot be loaded; names the command.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: its shared library is missing
        raise DataError(
            f"{name} cannot be imported ({first_line(error)}), and {extra} needs it: "
            f"{install_command(extra)} in the checkout."
        ) from error
