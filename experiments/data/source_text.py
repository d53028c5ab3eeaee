"""Text that every Python has: the source files of its standard library, as bytes."""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.harness.errors import DataError

TEST_EVERY = 10  # of the files in order of their names, this one is for testing


class SourceText(NamedTuple):
    """The files that lie directly in the standard library's directory.

    Attributes:
      train: uint8 (N,), the files for training one after the other.
      test: uint8 (M,), every tenth file.
      num_files: number of both.
      sha256: of the names and contents of all files; it differs between versions of
        Python.
    """

    train: np.ndarray
    test: np.ndarray
    num_files: int
    sha256: str


def load() -> SourceText:
    """Reads the files of the Python that runs.

    Raises:
      DataError: if they are missing, as where the library is an archive.
    """
    directory = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(directory.glob("*.py"), key=lambda path: path.name)
    if len(paths) < TEST_EVERY:
        raise DataError(
            f"expected the standard library's source files in {directory}, found "
            f"{len(paths)}; use a Python that is installed with them."
        )
    try:
        files = [path.read_bytes() for path in paths]
    except OSError as error:
        raise DataError(
            f"cannot read the standard library: {error}; make its files readable."
        ) from error
    digest = hashlib.sha256()
    for path, content in zip(paths, files, strict=True):
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    test = files[TEST_EVERY - 1 :: TEST_EVERY]
    train = [x for i, x in enumerate(files) if i % TEST_EVERY != TEST_EVERY - 1]
    train_text, test_text = (
        np.frombuffer(b"".join(part), np.uint8) for part in (train, test)
    )
    return SourceText(train_text, test_text, len(files), digest.hexdigest())
