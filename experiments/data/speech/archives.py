"""Recordings inside tar files, read at random without unpacking them into files.

A compressed archive has no random access, so it is decompressed once, as one tar file,
into the cache; a member is then a range of bytes of that file.
"""

import gzip
import hashlib
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

from experiments.data import cache
from experiments.harness.errors import DataError, first_line
from experiments.harness.files import atomic_write

_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError)


class Member(NamedTuple):
    """A file inside a tar file: its name, and the range of bytes that holds it."""

    name: str
    offset: int
    num_bytes: int


def decompressed(archive: Path, folder: Path) -> Path:
    """Returns the tar file of a `.tar.gz`, from the folder or written there now.

    Args:
      archive: the compressed archive.
      folder: where the tar file goes, in the cache. It is called after the archive and
        a hash of its path, size and time of change.

    Raises:
      DataError: if the archive is damaged or unreadable, or the folder cannot be
        written; no half-written file stays behind.
    """
    try:
        stat = archive.stat()
        identity = repr((str(archive.resolve()), stat.st_size, stat.st_mtime_ns))
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        path = folder / f"{archive.name.removesuffix('.tar.gz')}-{digest}.tar"
        if not path.is_file():
            with cache.locked(folder):
                _decompress(archive, path)
    except _DAMAGED as error:
        raise DataError(
            f"{archive} is damaged ({first_line(error)}); download the corpus again."
        ) from error
    except OSError as error:
        raise DataError(
            f"{archive} cannot be unpacked into {folder}: {error.strerror or error}; "
            "make room for the audio (AISHELL-1 needs 20 GB), or unpack the archives "
            "yourself; MPJAX_DATA_DIR names another place for the cache."
        ) from error
    return path


def members(tar: Path) -> list[Member]:
    """Returns the regular files of a tar file that is not compressed.

    Raises:
      DataError: if the file is damaged or cannot be opened.
    """
    try:
        with tarfile.open(tar, "r:") as archive:
            return [
                Member(info.name, info.offset_data, info.size)
                for info in archive
                if info.isreg() and not info.issparse()
            ]
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{tar} is damaged ({first_line(error)}); delete it and run again."
        ) from error


def _decompress(archive: Path, path: Path) -> None:
    if path.is_file():  # by another process, which held the lock
        return
    for left_by_a_killed_run in path.parent.glob(f".{path.name}.*"):
        left_by_a_killed_run.unlink()
    with (
        atomic_write(path) as temporary,
        gzip.open(archive) as source,
        temporary.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
        with tarfile.open(temporary, "r:") as whole:  # a damaged tar raises here
            whole.getmembers()
