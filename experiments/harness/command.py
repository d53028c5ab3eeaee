"""The command that started this process, as text to run again."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

RESUME_FLAGS = ("--resume", "--no-resume")


def command_line() -> str:
    """Returns the command as it is recorded with a result."""
    return shlex.join(["python", *_program(), *sys.argv[1:]])


def continuation(flags: Sequence[str]) -> str:
    """Returns the command that continues this one, to paste into a shell.

    Args:
      flags: flags to add, such as `--workdir runs/x --resume`; a `--workdir` that the
        command already has is kept.
    """
    given = sys.argv[1:]
    if flags:
        given = [flag for flag in given if flag not in RESUME_FLAGS]
    if any(flag.split("=")[0] == "--workdir" for flag in given):
        flags = [flag for flag in flags if flag in RESUME_FLAGS]
    return shlex.join([_python(), *_program(), *given, *flags])


def module_name() -> str:
    """Returns `python -m experiments.NAME` or `python FILE`, as it was started."""
    return shlex.join(["python", *_program()])


def _program() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return [Path(sys.argv[0]).name]
    return ["-m", spec.name.removesuffix(".__main__")]


def _python() -> str:
    """Returns `python` if that starts this interpreter, otherwise its path."""
    found = shutil.which("python")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return "python"
    return sys.executable
