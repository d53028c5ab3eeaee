"""The directory of a run: one configuration, one process at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from experiments.harness.config import BaseConfig, default_workdir
from experiments.harness.errors import WorkdirError
from experiments.harness.files import read_json, translate_os_errors, write_json


@contextlib.contextmanager
def open_workdir(config: BaseConfig, experiment: str) -> Iterator[Path]:
    """Makes or reopens the run's directory and holds its lock during the block.

    Args:
      config: names the directory (by default a new one below `runs`) and says whether
        to resume.
      experiment: its name, which a resumed run must share.

    Raises:
      WorkdirError: if the directory holds another configuration, holds a run without
        --resume, holds no run with --resume, is in use, or cannot be written.
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
        with translate_os_errors(path):
            _check_config(path, config, experiment)
        yield path
    finally:
        lock.release()


def _check_config(path: Path, config: BaseConfig, experiment: str) -> None:
    """Writes config.json into a new directory, or compares the one that is there."""
    wanted = {"experiment": experiment, **config.comparable()}
    file = path / "config.json"
    if not file.exists():
        write_json(file, wanted)
        return
    existing = read_json(file)
    if not isinstance(existing, dict):
        raise WorkdirError(
            f"{file} is damaged: expected settings by name, got {existing!r}; use "
            "another --workdir."
        )
    differences = [
        f"{key} is {existing.get(key)!r} there and {wanted.get(key)!r} here"
        for key in {**existing, **wanted}
        if existing.get(key) != wanted.get(key)
    ]
    if differences:
        raise WorkdirError(
            f"{path} holds a run with another configuration: {'; '.join(differences)}. "
            "Use the same flags, or another --workdir."
        )
    if not config.resume:
        raise WorkdirError(
            f"{path} already holds this run; pass --resume to continue it, or use "
            "another --workdir."
        )
