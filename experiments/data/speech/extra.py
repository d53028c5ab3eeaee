"""The libraries of the extra [speech], imported when they are first needed."""

import importlib
from types import ModuleType

from experiments.harness.errors import DataError, first_line

INSTALL = 'pip install -e ".[speech]"'


def import_extra(name: str) -> ModuleType:
    """Returns a library that the extra [speech] installs.

    Raises:
      DataError: if it is not installed or cannot be loaded; names the command.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: its shared library is missing
        raise DataError(
            f"{name} cannot be imported ({first_line(error)}), and speech needs it: "
            f"{INSTALL} in the checkout."
        ) from error
