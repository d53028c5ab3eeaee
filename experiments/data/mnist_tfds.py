"""MNIST through TensorFlow Datasets, without TensorFlow.

TFDS's own builder needs TensorFlow to prepare a data set. The subclass here downloads
the same files, verified by the same checksums, and writes the same examples, as PNG
bytes, into array_record: the only format that loses nothing and is readable without
TensorFlow.
TFDS shuffles what it writes, always in the same order; reading undoes the shuffle.

`prepare` runs this module in a process of its own, so that a stalled download ends with
a time-out.
"""

import gzip
import hashlib
import importlib
import io
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from experiments.data import cache, process
from experiments.harness.errors import DataError, first_line

VERSION = "3.0.1"
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
PROBE_TIMEOUT_S = 10.0
PREPARE_TIMEOUT_S = 300.0
SCRATCH_PREFIX = ".prepare-"
CHUNK = 1000


def prepared_directories() -> list[Path]:
    """Returns the usual TFDS directories that hold a prepared MNIST."""
    places = (os.environ.get("TFDS_DATA_DIR"), "~/tensorflow_datasets")
    paths = [Path(os.path.expanduser(place)) for place in places if place]
    return [path for path in dict.fromkeys(paths) if is_prepared(path)]


def is_prepared(data_dir: Path) -> bool:
    """Whether the directory holds a prepared MNIST.

    TFDS itself gives a misleading error where it does not.
    """
    return os.path.isfile(_dataset_dir(data_dir) / "dataset_info.json")


def read(data_dir: Path) -> dict[str, np.ndarray]:
    """Reads a prepared MNIST.

    Returns:
      x_train (60000, 28, 28), y_train, x_test (10000, 28, 28), y_test; uint8, in the
      original order.

    Raises:
      DataError: if TFDS is not installed, or the files are damaged or in a format that
        only TensorFlow reads.
    """
    tfds = _tfds()
    directory = _dataset_dir(data_dir)
    try:
        builder = tfds.builder_from_directory(str(directory))
        file_format = builder.info.file_format.value
        if file_format != "array_record":
            raise DataError(
                f"{directory} is prepared as {file_format}, which cannot be read whole "
                "without TensorFlow; prepare it with file_format='array_record'"
            )
        return _read_split(builder, "train") | _read_split(builder, "test")
    except DataError:
        raise
    except Exception as error:  # TFDS raises what its readers raise: anything
        raise DataError(
            f"TFDS cannot read {directory} ({first_line(error)}); delete that "
            "directory and run again"
        ) from error


def prepare(data_dir: Path) -> None:
    """Prepares MNIST in `data_dir`, downloading what `downloads/manual` does not hold.

    It does nothing if another process has prepared MNIST in the meantime.

    Raises:
      DataError: if the host cannot be reached in 10 s, or preparing fails or takes more
        than 5 minutes; no half-written dataset stays behind.
    """
    _tfds()
    target = _dataset_dir(data_dir)
    if os.path.lexists(target) and not is_prepared(data_dir):
        raise DataError(
            f"{target} exists, but holds no dataset_info.json, so it is not a prepared "
            "dataset, or an incomplete one; move or delete it"
        )
    if not _has_manual_files(data_dir):
        _probe()
    with cache.locked(data_dir):
        if not is_prepared(data_dir):
            _prepare_locked(data_dir, target)


def prepare_and_read(data_dir: Path) -> dict[str, np.ndarray]:
    """Prepares MNIST if it is not prepared, and reads it."""
    if not is_prepared(data_dir):
        prepare(data_dir)
    return read(data_dir)


def _dataset_dir(data_dir: Path) -> Path:
    return data_dir / "mnist" / VERSION


def _read_split(builder, split: str) -> dict[str, np.ndarray]:
    source = builder.as_data_source(split=split)
    images, labels = [], []
    for start in range(0, len(source), CHUNK):
        indices = list(range(start, min(start + CHUNK, len(source))))
        for example in source.__getitems__(indices):
            images.append(example["image"][..., 0])
            labels.append(example["label"])
    x, y = np.stack(images), np.array(labels, np.uint8)
    if not builder.info.disable_shuffling:
        order = np.argsort(_written_order(split, len(y)))
        x, y = x[order], y[order]
    return {f"x_{split}": x, f"y_{split}": y}


def _written_order(split: str, num_examples: int) -> list[int]:
    """Returns the index of the example in each record.

    TFDS sorts examples by the md5 of the split's name and the example's key, which is
    its index here (`tensorflow_datasets.core.hashing`).
    """
    salt = hashlib.md5(split.encode(), usedforsecurity=False)

    def digest(index: int) -> bytes:
        md5 = salt.copy()
        md5.update(str(index).encode())
        return md5.digest()

    return sorted(range(num_examples), key=digest)


def _has_manual_files(data_dir: Path) -> bool:
    manual = data_dir / "downloads" / "manual"
    return all(
        os.path.isfile(manual / name) for pair in FILES.values() for name in pair
    )


def _probe() -> None:
    """Asks the host for a header; TFDS alone would retry a dead network for minutes.

    It asks in a thread, because looking up a host name has no time-out.
    """
    import requests
    from tensorflow_datasets.image_classification import mnist

    url = mnist.MNIST.URL + FILES["test"][1]
    answers = queue.SimpleQueue()

    def ask():
        try:
            answers.put(requests.head(url, timeout=PROBE_TIMEOUT_S))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=PROBE_TIMEOUT_S)
    except queue.Empty:
        reason = f"gave no answer in {PROBE_TIMEOUT_S:.0f} s"
    else:
        if isinstance(answer, requests.Response) and answer.ok:
            return
        if isinstance(answer, requests.Response):
            reason = f"answered {answer.status_code} {answer.reason}"
        else:
            reason = f"cannot be reached ({type(answer).__name__})"
    raise DataError(f"its host {reason}; check the connection")


def _prepare_locked(data_dir: Path, target: Path) -> None:
    with cache.translate_os_errors(data_dir):
        for left_by_a_killed_run in data_dir.glob(f"{SCRATCH_PREFIX}*"):
            shutil.rmtree(left_by_a_killed_run)
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=data_dir))
    try:
        _run(data_dir, scratch)
        with cache.translate_os_errors(target):
            target.parent.mkdir(exist_ok=True)
            os.replace(_dataset_dir(scratch), target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(data_dir: Path, scratch: Path) -> None:
    root = str(Path(__file__).parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    env = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TMPDIR": str(scratch),  # TFDS leaves a directory there
    }
    command = [sys.executable, "-P", "-m", __name__, str(data_dir), str(scratch)]
    try:
        done = process.run(command, timeout_s=PREPARE_TIMEOUT_S, env=env)
    except subprocess.TimeoutExpired:
        raise DataError(
            f"TFDS did not finish in {PREPARE_TIMEOUT_S:.0f} s; check the connection, "
            "or try again"
        ) from None
    if done.returncode < 0:
        raise DataError(f"TFDS was killed by signal {-done.returncode}; try again")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"TFDS cannot prepare MNIST: {lines[-1]}")


def _prepare_here(data_dir: Path, scratch: Path) -> None:
    tfds = _tfds()
    from tensorflow_datasets.image_classification import mnist

    class Mnist(mnist.MNIST, skip_registration=True):
        """TFDS's MNIST, with extraction and encoding that need no TensorFlow."""

        name = "mnist"

        def _split_generators(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, dl_manager
        ):
            urls = {
                split: [self.URL + name for name in pair]
                for split, pair in FILES.items()
            }
            files = dl_manager.download(urls)
            return {split: self._generate_examples(*files[split]) for split in files}

        def _generate_examples(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, image_path, label_path
        ):
            images = _read_idx(image_path, header=16).reshape(-1, 28, 28)
            for index, label in enumerate(_read_idx(label_path, header=8)):
                image = io.BytesIO(_png(images[index]))
                yield index, {"image": image, "label": int(label)}

    builder = Mnist(data_dir=str(scratch), file_format="array_record")
    config = tfds.download.DownloadConfig(
        manual_dir=str(data_dir / "downloads" / "manual")
    )
    builder.download_and_prepare(
        download_dir=str(scratch / "downloads"), download_config=config
    )


def _read_idx(path: os.PathLike[str], header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _tfds():
    try:
        for needed in ("array_record", "importlib_resources", "PIL.Image", "requests"):
            importlib.import_module(needed)
        return importlib.import_module("tensorflow_datasets")
    except Exception as error:  # a TFDS that does not fit its protobuf: a TypeError
        raise DataError(
            f"TFDS, or what it needs, cannot be imported ({first_line(error)}); pip "
            "install 'mpjax[experiments]'"
        ) from error


def _main(data_dir: Path, scratch: Path) -> None:
    """Prepares MNIST; on failure, the last line of stderr gives the reason."""
    try:
        _prepare_here(data_dir, scratch)
    except Exception as error:
        text = " ".join(str(error).partition("To debug, see")[0].split())
        if "wrong checksum" in text:
            text += "; replace that file, or delete it to have it downloaded"
        print(f"{type(error).__name__}: {text}", file=sys.stderr, flush=True)
        os._exit(1)  # other downloads may still be trying again, for minutes


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
