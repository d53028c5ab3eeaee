"""The directory of a run: one configuration, one process at a time, whole files."""

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from experiments.harness.config import BaseConfig, default_workdir
from experiments.harness.errors import WorkdirError


@contextlib.contextmanager
def opened(config: BaseConfig, experiment: str) -> Iterator[Path]:
    """Makes or reopens the run's directory and holds its lock.

    Raises:
      WorkdirError: if it holds another configuration, holds a run and --resume is not
        given, holds none and it is, is in use, or cannot be written.
    """
    path = (config.workdir or default_workdir(experiment)).expanduser()
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        if config.resume and not (path / "config.json").is_file():
            raise WorkdirError(
                f"--resume: {path} holds no run; leave --resume out to start one there."
            )
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise WorkdirError(
            f"another process is running in {path}; wait for it, or use another "
            "--workdir."
        ) from None
    except OSError as error:
        raise WorkdirError(
            f"cannot use --workdir {path}: {error.strerror or error}; choose "
            "a directory that can be written."
        ) from error
    try:
        with writing(path):
            _check_config(path, config, experiment)
        yield path
    finally:
        lock.release()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an operating-system error about a run's files into a `WorkdirError`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "make it writable"
        raise WorkdirError(
            f"cannot write in {path}: {error.strerror or error}; {remedy}, then "
            "continue with --resume. What was written before is kept."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as a whole file; numbers that are not finite become null."""
    write_text(path, json.dumps(_strict(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text as a whole file."""
    with whole_file(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write; renamed after the block, deleted on an error."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Reads JSON; WorkdirError for a damaged file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{path} cannot be read ({error}); use another --workdir, or delete "
            "that file's directory if nothing in it is needed."
        ) from error


def _check_config(path: Path, config: BaseConfig, experiment: str) -> None:
    wanted = {"experiment": experiment, **config.comparable()}
    file = path / "config.json"
    if not file.exists():
        write_json(file, wanted)
        return
    held = read_json(file)
    if not isinstance(held, dict):
        raise WorkdirError(
            f"{file} is damaged: expected settings by name, got {held!r}; use another "
            "--workdir."
        )
    keys = [key for key in {**held, **wanted} if held.get(key) != wanted.get(key)]
    if keys:
        differences = "; ".join(
            f"{key} is {held.get(key)!r} there and {wanted.get(key)!r} here"
            for key in keys
        )
        raise WorkdirError(
            f"{path} holds a run with another configuration: {differences}. Use the "
            "same flags, or another --workdir."
        )
    if not config.resume:
        raise WorkdirError(
            f"{path} already holds this run; pass --resume to continue it, or use "
            "another --workdir."
        )


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
