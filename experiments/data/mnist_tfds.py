"""MNIST through TensorFlow Datasets, without TensorFlow.

TFDS's own builder needs TensorFlow to prepare. The subclass here downloads the same
files, checked by the same checksums, and writes the same examples as PNG bytes into
array_record, the one format that can be read back without TensorFlow and loses nothing.

`python -m experiments.data.mnist_tfds DIRECTORY` prepares; `prepare` runs that in
a process of its own, so that a stalled download ends with a time-out.
"""

import gzip
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from experiments.data import cache
from experiments.errors import DataError

VERSION = "3.0.1"
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
PROBE_TIMEOUT_S = 5.0
PREPARE_TIMEOUT_S = 300.0
CHUNK = 1000


def prepared_directories() -> list[Path]:
    """Returns the usual TFDS directories that hold a prepared MNIST."""
    places = [os.environ.get("TFDS_DATA_DIR"), Path.home() / "tensorflow_datasets"]
    return [Path(place) for place in places if place and is_prepared(Path(place))]


def is_prepared(data_dir: Path) -> bool:
    """Whether the directory holds MNIST; TFDS itself gives a misleading error."""
    return (data_dir / "mnist" / VERSION / "dataset_info.json").is_file()


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
    try:
        builder = tfds.builder_from_directory(str(data_dir / "mnist" / VERSION))
        file_format = builder.info.file_format.value
        if file_format != "array_record":
            raise DataError(
                f"it is prepared as {file_format}, which cannot be read whole without "
                "TensorFlow; prepare it with file_format='array_record'"
            )
        arrays = {}
        for split in ("train", "test"):
            arrays |= _read_split(builder.as_data_source(split=split), split)
        return arrays
    except DataError:
        raise
    except Exception as error:  # TFDS raises what its readers raise: anything
        raise DataError(
            f"TFDS cannot read {data_dir / 'mnist' / VERSION} ({_first_line(error)}); "
            "delete that directory and run again"
        ) from error


def prepare(data_dir: Path) -> None:
    """Prepares MNIST in `data_dir`, downloading what `downloads/manual` does not hold.

    Raises:
      DataError: if the host cannot be reached in 5 s, or preparing fails or takes more
        than 5 minutes; no half-written dataset stays behind.
    """
    _tfds()
    if not _has_manual_files(data_dir):
        _probe()
    with cache.explained(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".prepare-", dir=data_dir))
    try:
        _run(data_dir, scratch)
        target = data_dir / "mnist" / VERSION
        with cache.explained(target):
            target.parent.mkdir(exist_ok=True)
            os.replace(scratch / "mnist" / VERSION, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def prepare_and_read(data_dir: Path) -> dict[str, np.ndarray]:
    """Prepares MNIST unless it is, and reads it; see `prepare` and `read`."""
    if not is_prepared(data_dir):
        prepare(data_dir)
    return read(data_dir)


def _read_split(source, split: str) -> dict[str, np.ndarray]:
    images, labels = [], []
    for start in range(0, len(source), CHUNK):
        indices = list(range(start, min(start + CHUNK, len(source))))
        for example in source.__getitems__(indices):
            images.append(example["image"][..., 0])
            labels.append(example["label"])
    return {f"x_{split}": np.stack(images), f"y_{split}": np.array(labels, np.uint8)}


def _has_manual_files(data_dir: Path) -> bool:
    manual = data_dir / "downloads" / "manual"
    return all((manual / name).is_file() for pair in FILES.values() for name in pair)


def _probe() -> None:
    """Asks for a header: TFDS alone would retry a dead network for minutes."""
    import requests
    from tensorflow_datasets.image_classification import mnist

    url = mnist.MNIST.URL + FILES["test"][1]
    try:
        requests.head(url, timeout=(PROBE_TIMEOUT_S, PROBE_TIMEOUT_S)).raise_for_status()
    except requests.RequestException as error:
        raise DataError(
            f"its host cannot be reached ({type(error).__name__})"
        ) from error


def _run(data_dir: Path, scratch: Path) -> None:
    root = str(Path(__file__).parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", __name__, str(data_dir), str(scratch)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PREPARE_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"TFDS was not done in {PREPARE_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise DataError(f"TFDS cannot prepare MNIST: {lines[-1] if lines else 'killed'}")


def _prepare_here(data_dir: Path, scratch: Path) -> None:
    tfds = _tfds()
    from tensorflow_datasets.image_classification import mnist

    class Mnist(mnist.MNIST, skip_registration=True):
        """TFDS's MNIST, with extraction and encoding that need no TensorFlow."""

        name = "mnist"

        def _split_generators(self, dl_manager):
            urls = {
                split: [self.URL + name for name in pair]
                for split, pair in FILES.items()
            }
            files = dl_manager.download(urls)
            return {split: self._generate_examples(*files[split]) for split in files}

        def _generate_examples(self, image_path, label_path):
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
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(
            f"TFDS is not installed ({error}); pip install 'mpjax[experiments]'"
        ) from error
    return tensorflow_datasets


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    _prepare_here(Path(sys.argv[1]), Path(sys.argv[2]))
