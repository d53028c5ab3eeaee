"""A directory of datasets: one writer at a time, whole files or none."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np

from experiments.errors import DataError

LOCK_TIMEOUT_S = 600.0


def cache_dir() -> Path:
    """Returns `$MPJAX_DATA_DIR`, by default `~/.cache/mpjax`."""
    return Path(os.environ.get("MPJAX_DATA_DIR") or Path.home() / ".cache" / "mpjax")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes the directory and holds its lock, so that two runs do not fetch at once.

    Raises:
      DataError: if the directory cannot be written, or another process keeps the lock
        for ten minutes.
    """
    lock = filelock.FileLock(directory / ".lock", timeout=LOCK_TIMEOUT_S)
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise DataError(
                f"another process has held {lock.lock_file} for {LOCK_TIMEOUT_S:.0f} s; "
                "wait for it, or end it and run again."
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an operating-system error about the cache into a `DataError`."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            remedy = "free some space (MNIST needs 100 MB)"
        else:
            remedy = "make it writable"
        raise DataError(
            f"cannot write the data cache {path}: {error.strerror or error}; {remedy}, "
            "or point MPJAX_DATA_DIR to another directory. Nothing was left there."
        ) from error


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an npz under a temporary name, then renames it.

    Raises:
      DataError: if it cannot be written; no part of it stays behind.
    """
    with explained(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads every array of an npz; never unpickles.

    Raises:
      ValueError, OSError, KeyError or zipfile.BadZipFile: if the file is damaged.
    """
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
