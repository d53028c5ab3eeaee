"""From the command line to `main(config)`: flags, and errors as text."""

import contextlib
import importlib
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from experiments.harness import command
from experiments.harness.config import BaseConfig
from experiments.harness.errors import ExperimentError
from experiments.harness.stop import Interrupted


def run(main: Callable[[Any], Any], config_type: type, *, doc: str | None) -> None:
    """Reads the flags, runs the command and exits.

    An expected failure ends as a paragraph on stderr and a non-zero exit code: an
    `ExperimentError`, gradients that stay non-finite, a step that cannot be compiled
    for a GPU here, a package that is not installed, Ctrl-C, or a reader of stdout that
    is gone. Any other exception is a defect and keeps its traceback.

    Args:
      main: takes the config.
      config_type: a dataclass whose fields are the flags.
      doc: the module's docstring, shown by --help.
    """
    try:
        import tyro  # here, so that its absence is explained

        from experiments.harness import help_text  # imports what tyro needs

        help_text.fill_flags(config_type)
        text = help_text.fill(doc or "")
        config = tyro.cli(config_type, description=text, prog=command.module_name())
        with _library_errors():
            main(config)
    except Interrupted as error:
        fail(f"{error}\n    {command.continuation(error.flags)}", error.exit_code)
    except ExperimentError as error:
        fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "experiments", "mpjax"):
            raise
        fail(
            f"the package {package} is not installed; the experiments need more than "
            'the library: pip install -e ".[experiments]"',
            1,
        )
    except KeyboardInterrupt:
        text = "stopped at once; a run that has a checkpoint continues with --resume."
        fail(text, 128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of stdout has gone; Python's own flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail("stopped: nobody reads the output any more.", 128 + signal.SIGPIPE)


def run_module(name: str, config_type: type, *, doc: str | None) -> NoReturn:
    """Reads the flags, then imports a command, runs it and exits; see `run`.

    A command calls it before its own imports, which take seconds: --help, and what is
    wrong with the flags and the paths that they name, is said without them.

    Args:
      name: full name of a module whose `main` takes the config; its last part names the
        experiment.
      config_type: a dataclass whose fields are the flags.
      doc: the module's docstring, shown by --help.
    """

    def main(config):
        if isinstance(config, BaseConfig):
            config.check_paths(name.rpartition(".")[2])
            if config.mesh is not None or config.distributed:
                return _run_on_devices(name, config)
        return importlib.import_module(name).main(config)

    run(main, config_type, doc=doc)
    sys.exit()


def _run_on_devices(name: str, config: BaseConfig) -> None:
    """Runs a command in one of several processes, or on a mesh."""
    import mpjax
    from experiments.harness import processes
    from experiments.harness.devices import make_devices

    processes.order_messages()
    processes.start(config)
    make_devices(config)  # an error in the mesh is said before data are read
    try:
        importlib.import_module(name).main(config)
    except Interrupted as error:
        if processes.is_first():
            raise
        sys.exit(error.exit_code)  # all were stopped, and the first one says so
    except (mpjax.NonFiniteTrainingError, ModuleNotFoundError):
        raise  # in every process
    except Exception as error:
        processes.end_alone(error)
        raise


def fail(message: str, exit_code: int) -> NoReturn:
    """Prints a message on stderr, after "error:", and exits.

    Args:
      message: wrapped at 88 columns, except for lines that begin with a space.
      exit_code: exit code of the process.
    """
    lines = f"error: {message}".splitlines()
    print("\n".join(map(_wrap, lines)), file=sys.stderr, flush=True)
    sys.exit(exit_code)


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """Turns the library's expected errors into an `ExperimentError`."""
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:
        import mpjax.cost

        if isinstance(error, mpjax.NonFiniteTrainingError):
            raise ExperimentError(f"training stopped: {error}") from error
        if isinstance(error, mpjax.cost.CompileError):
            raise ExperimentError(str(error)) from error
        raise


def _wrap(line: str) -> str:
    if line.startswith(" "):
        return line
    return textwrap.fill(line, 88, break_on_hyphens=False, break_long_words=False)
