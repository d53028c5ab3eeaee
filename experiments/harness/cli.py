"""From the command line to `main(config)`: flags, and errors as text."""

import signal
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import tyro

from experiments.errors import ExperimentError
from mpjax import NonFiniteTrainingError


def run(main: Callable[[Any], Any], config_type: type, *, doc: str | None) -> None:
    """Reads the flags, runs the experiment and exits.

    An expected error ends as a paragraph on stderr and a non-zero exit code; anything
    else is a defect and keeps its traceback.

    Args:
      main: takes the config.
      config_type: a dataclass whose fields are the flags.
      doc: the module's docstring, shown by --help.
    """
    try:
        config = tyro.cli(config_type, description=doc)
        main(config)
    except ExperimentError as error:
        fail(str(error), error.exit_code)
    except NonFiniteTrainingError as error:
        fail(f"training stopped: {error}", 1)
    except KeyboardInterrupt:
        fail("stopped.", 128 + signal.SIGINT)


def fail(message: str, exit_code: int) -> None:
    """Prints a message as a paragraph on stderr and exits."""
    lines = f"error: {message}".splitlines()
    text = "\n".join(textwrap.fill(line, 88, break_on_hyphens=False) for line in lines)
    print(text, file=sys.stderr, flush=True)
    sys.exit(exit_code)
