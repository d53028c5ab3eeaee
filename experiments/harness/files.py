"""Files that are written whole or not at all, and what their errors mean."""

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.harness.errors import WorkdirError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write; renames it after the block.

    An exception in the block deletes the temporary file, and a file that was there
    stays as it was.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(_strict(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
      WorkdirError: if the file is damaged or cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{path} cannot be read ({error}); use another --workdir, or delete "
            "that file's directory if nothing in it is needed."
        ) from error


@contextlib.contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Turns an operating-system error about a run's files into a `WorkdirError`.

    A broken pipe passes: it concerns the output on the terminal, not the files.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        full = error.errno in DISK_FULL
        remedy = "free some space" if full else "make it writable"
        raise WorkdirError(
            f"cannot write in {path}: {error.strerror or error}; {remedy}, then "
            "continue with --resume. What was written before is kept."
        ) from error


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
