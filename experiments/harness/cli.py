"""From the command line to `main(config)`: flags, and errors as text."""

import os
import signal
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

import tyro

from experiments.harness import command
from experiments.harness.errors import ExperimentError
from experiments.harness.stop import Interrupted
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
        config = tyro.cli(config_type, description=doc, prog=command.module_name())
        main(config)
    except Interrupted as error:
        fail(f"{error}\n    {command.continuation(error.flags)}", error.exit_code)
    except ExperimentError as error:
        fail(str(error), error.exit_code)
    except NonFiniteTrainingError as error:
        fail(f"training stopped: {error}", 1)
    except KeyboardInterrupt:
        text = "stopped at once; a run that has a checkpoint continues with --resume."
        fail(text, 128 + signal.SIGINT)
    except BrokenPipeError:
        # Whoever read stdout has gone; Python's own flush at exit would say so again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail("stopped: nobody reads the output any more.", 128 + signal.SIGPIPE)


def fail(message: str, exit_code: int) -> NoReturn:
    """Prints a message on stderr and exits.

    Args:
      message: filled to 88 columns, but for lines that begin with a space.
      exit_code: of the process.
    """
    lines = f"error: {message}".splitlines()
    print("\n".join(map(_filled, lines)), file=sys.stderr, flush=True)
    sys.exit(exit_code)


def _filled(line: str) -> str:
    if line.startswith(" "):
        return line
    return textwrap.fill(line, 88, break_on_hyphens=False, break_long_words=False)
