"""The directory of cached datasets: one writer at a time, atomic files."""

import contextlib
import errno
import math
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import filelock
import numpy as np

from experiments.harness.errors import DataError
from experiments.harness.files import DISK_FULL, atomic_write

LOCK_TIMEOUT_S = 600.0
_IN_THE_WAY = {errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY}


def cache_dir() -> Path:
    """Returns `$MPJAX_DATA_DIR`, by default `~/.cache/mpjax`.

    Raises:
      DataError: if the path names a home directory that is unknown.
    """
    place = os.environ.get("MPJAX_DATA_DIR") or "~/.cache/mpjax"
    path = os.path.expanduser(place)
    if path.startswith("~"):
        raise DataError(
            f"no home directory is known for the data cache {place}; point "
            "MPJAX_DATA_DIR to a directory."
        )
    return Path(path)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes the directory and holds its lock, so that only one run fetches at a time.

    Raises:
      DataError: if the directory cannot be written, or another process keeps the lock
        for ten minutes.
    """
    lock = filelock.FileLock(directory / ".lock")
    with translate_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _acquire(lock)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def translate_os_errors(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Turns an operating-system error about a data directory into a `DataError`.

    Args:
      path: what is written in the block.
      num_bytes: how much room it takes, if that is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            needed = (
                f" ({math.ceil(num_bytes / 1e6)} MB are needed)" if num_bytes else ""
            )
            remedy = f"make room{needed}"
        elif error.errno in _IN_THE_WAY:
            remedy = "move what is in its way"
        else:
            remedy = "make it writable"
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; {remedy}, or use another "
            "directory: MPJAX_DATA_DIR names the cache, --data-dir one of TFDS."
        ) from error


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an npz atomically.

    The caller holds the lock of the directory.

    Args:
      path: the file to write or replace.
      arrays: numeric arrays by name.

    Raises:
      DataError: if the file cannot be written; no part of it stays behind.
    """
    num_bytes = sum(array.nbytes for array in arrays.values())
    with translate_os_errors(path, num_bytes):
        remove_temporaries(path)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            _write_zip(file, arrays)
            file.flush()
            os.fsync(file.fileno())


def remove_temporaries(path: Path) -> None:
    """Removes what a killed run left of a file that it wrote atomically."""
    for left_over in path.parent.glob(f".{path.name}.*"):
        left_over.unlink()


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads every array of an npz; never unpickles.

    Raises:
      DataError: if the file is damaged or cannot be opened.
    """
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # a damaged file can raise anything in zipfile and NumPy
        raise DataError(f"{type(error).__name__}: {error}") from error


def report(text: str) -> None:
    """Prints a message on stderr."""
    print(text, file=sys.stderr, flush=True)


def _write_zip(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """Writes the format of `np.savez`, which pickles objects in NumPy 2.0."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _acquire(lock: filelock.BaseFileLock) -> None:
    try:
        lock.acquire(timeout=0)
        return
    except filelock.Timeout:
        report(f"waiting for the process that holds {lock.lock_file}")
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except filelock.Timeout:
        raise DataError(
            f"another process has held {lock.lock_file} for {LOCK_TIMEOUT_S:.0f} s; "
            "wait for it, or end it and run again."
        ) from None
