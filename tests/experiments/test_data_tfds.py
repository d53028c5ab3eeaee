"""MNIST through TFDS: the original files, prepared and read, and what can go wrong."""

import hashlib
import http.server
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pytest

from experiments.data import cache, mnist, mnist_tfds, mnist_wheel
from experiments.harness.errors import DataError

# name inside the .gz, name of the .gz, its time, its sha256 (which TFDS pins)
ORIGINALS = {
    "x_train": (
        "train-images.idx3-ubyte",
        "train-images-idx3-ubyte.gz",
        848331386,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "y_train": (
        "train-labels.idx1-ubyte",
        "train-labels-idx1-ubyte.gz",
        848331398,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    "x_test": (
        "t10k-images.idx3-ubyte",
        "t10k-images-idx3-ubyte.gz",
        885827245,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "y_test": (
        "t10k-labels.idx1-ubyte",
        "t10k-labels-idx1-ubyte.gz",
        885827268,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
}
RECORDS = "mnist/3.0.1/mnist-train.array_record-00000-of-00001"


def original_gz(raw: bytes, name: str, time_s: int) -> bytes:
    """Rebuilds an original file: GNU gzip's bytes under the header of 1996."""
    gzip = ["gzip", "-6", "-n"]
    made = subprocess.run(gzip, input=raw, capture_output=True, check=True).stdout
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", time_s) + made[8:10]
    return header + name.encode() + b"\0" + made[10:]


@pytest.fixture(scope="module")
def original_files(tmp_path_factory, wheel_arrays) -> Path:
    version = subprocess.run(["gzip", "--version"], capture_output=True, check=False)
    if b"Free Software Foundation" not in version.stdout:
        pytest.skip("needs GNU gzip: another one compresses differently")
    folder = tmp_path_factory.mktemp("originals")
    for array, (inner, outer, time_s, sha256) in ORIGINALS.items():
        content = original_gz(mnist.idx_bytes(wheel_arrays[array]), inner, time_s)
        assert hashlib.sha256(content).hexdigest() == sha256
        (folder / outer).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def wheel_arrays(wheel_file) -> dict[str, np.ndarray]:
    return mnist_wheel.read(wheel_file)


def with_originals(data_dir: Path, original_files: Path) -> Path:
    shutil.copytree(original_files, data_dir / "downloads" / "manual")
    return data_dir


@pytest.fixture
def data_dir(tmp_path, original_files) -> Path:
    return with_originals(tmp_path / "tfds", original_files)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, original_files) -> Path:
    """A prepared directory; the workers of a parallel run share one."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    data_dir = root / "prepared"
    with filelock.FileLock(root / "prepared.lock"):
        if not data_dir.exists():
            with_originals(data_dir, original_files)
    mnist_tfds.prepare(data_dir)
    return data_dir


@pytest.fixture
def copied(tmp_path, prepared) -> Path:
    """A copy of the prepared dataset, to damage."""
    return Path(shutil.copytree(prepared / "mnist", tmp_path / "copy" / "mnist")).parent


def contents(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def assert_equal(got: mnist.ImageDataset, expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        assert getattr(got, name).dtype == np.uint8
        assert np.array_equal(getattr(got, name), array), name


@pytest.mark.weekly
def test_what_is_read_is_every_image_of_the_wheel(prepared, wheel_arrays):
    assert_equal(mnist.load("mnist", prepared), wheel_arrays)


@pytest.mark.weekly
def test_preparing_leaves_the_dataset_and_nothing_else(prepared):
    assert contents(prepared) == ["downloads", "mnist"]
    assert contents(prepared / "downloads") == ["manual"]
    assert contents(prepared / "mnist") == ["3.0.1"]
    assert contents(prepared / "mnist" / "3.0.1") == [
        "dataset_info.json",
        "features.json",
        "mnist-test.array_record-00000-of-00001",
        "mnist-train.array_record-00000-of-00001",
    ]


def test_the_records_are_in_the_order_of_tfds_own_mnist(wheel_arrays):
    # tfds.load("mnist") has begun with these labels ever since version 3.0.0.
    train = mnist_tfds._written_order("train", 60000)
    test = mnist_tfds._written_order("test", 10000)
    assert sorted(train) == list(range(60000))
    assert wheel_arrays["y_train"][train[:10]].tolist() == [
        4,
        1,
        0,
        7,
        8,
        1,
        2,
        7,
        1,
        6,
    ]
    assert wheel_arrays["y_test"][test[:10]].tolist() == [2, 0, 4, 8, 7, 6, 0, 6, 3, 1]


def test_the_usual_directories_are_looked_up(monkeypatch, tmp_path):
    def pretend(data_dir: Path) -> Path:
        (data_dir / "mnist" / "3.0.1").mkdir(parents=True)
        (data_dir / "mnist" / "3.0.1" / "dataset_info.json").write_text("{}")
        return data_dir

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert mnist_tfds.prepared_directories() == []
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "named"))
    assert mnist_tfds.prepared_directories() == []
    home = pretend(tmp_path / "tensorflow_datasets")
    assert mnist_tfds.prepared_directories() == [home]
    named = pretend(tmp_path / "named")
    assert mnist_tfds.prepared_directories() == [named, home]
    monkeypatch.setenv("TFDS_DATA_DIR", "~/tensorflow_datasets")
    assert mnist_tfds.prepared_directories() == [home]
    monkeypatch.setenv("TFDS_DATA_DIR", "x" * 5000)
    assert mnist_tfds.prepared_directories() == [home]


def test_a_corrupted_original_is_refused(data_dir, tfds_host):
    bad = data_dir / "downloads" / "manual" / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(bad.read_bytes())
    content[1000] ^= 1
    bad.write_bytes(content)
    with pytest.raises(DataError) as caught:
        mnist.load("mnist", data_dir)
    message = str(caught.value)
    assert f"{bad}, has wrong checksum" in message
    assert ORIGINALS["y_test"][3] in message, "the expected checksum"
    assert hashlib.sha256(content).hexdigest() in message, "the one it has"
    assert "replace that file, or delete it to have it downloaded" in message
    assert contents(data_dir) == ["downloads"]
    assert contents(data_dir / "downloads") == ["manual"]


def test_a_truncated_original_is_refused(data_dir, tfds_host):
    bad = data_dir / "downloads" / "manual" / "train-images-idx3-ubyte.gz"
    os.truncate(bad, 1_000_000)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz, has wrong"):
        mnist_tfds.prepare(data_dir)
    assert contents(data_dir) == ["downloads"]


def test_a_host_that_is_down_is_explained_at_once(tmp_path, tfds_host):
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"its host cannot be reached \(ConnectionError\)"
    ):
        mnist_tfds.prepare(tmp_path / "tfds")
    assert time.monotonic() - start < 10
    assert contents(tmp_path) == []


def test_a_host_is_asked_if_one_original_is_missing(data_dir, tfds_host):
    (data_dir / "downloads" / "manual" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="its host cannot be reached"):
        mnist_tfds.prepare(data_dir)
    assert contents(data_dir) == ["downloads"]


def test_a_host_that_never_answers_ends_with_a_time_out(
    tmp_path, tfds_host, monkeypatch
):
    assert mnist_tfds.PROBE_TIMEOUT_S <= 15
    monkeypatch.setattr(mnist_tfds, "PROBE_TIMEOUT_S", 1.0)
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tfds_host(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(DataError, match=r"its host (gave no answer|.*ReadTimeout)"):
            mnist_tfds.prepare(tmp_path / "tfds")
    assert time.monotonic() - start < 5
    assert contents(tmp_path) == []


def test_a_name_that_is_looked_up_forever_ends_with_a_time_out(
    tmp_path, tfds_host, monkeypatch
):
    answered = threading.Event()

    def getaddrinfo(*_, **__):
        answered.wait(30)
        raise socket.gaierror("too late")

    monkeypatch.setattr(mnist_tfds, "PROBE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    start = time.monotonic()
    try:
        with pytest.raises(DataError, match="its host gave no answer"):
            mnist_tfds.prepare(tmp_path / "tfds")
        assert time.monotonic() - start < 5
    finally:
        answered.set()


def test_a_host_that_refuses_is_explained(tmp_path, tfds_host):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        tfds_host(f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(DataError, match="its host answered 403 Forbidden"):
            mnist_tfds.prepare(tmp_path / "tfds")
        thread.join()


@pytest.mark.parametrize("timeout_s", [0.01, 4.0])
def test_a_time_out_leaves_nothing_half_written(
    timeout_s, data_dir, monkeypatch, temporary
):
    killed_run = data_dir / ".prepare-killed" / "mnist"
    killed_run.mkdir(parents=True)
    monkeypatch.setattr(mnist_tfds, "PREPARE_TIMEOUT_S", timeout_s)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"TFDS did not finish in .* s; check the conn"):
        mnist_tfds.prepare(data_dir)
    assert time.monotonic() - start < timeout_s + 5
    assert contents(data_dir) == ["downloads"]
    assert contents(data_dir / "downloads") == ["manual"]
    assert contents(temporary) == []


def test_a_killed_process_is_explained(data_dir, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DataError, match="TFDS was killed by signal 9"):
        mnist_tfds.prepare(data_dir)
    assert contents(data_dir) == ["downloads"]


@pytest.mark.slow
def test_two_at_once_prepare_once(prepared, data_dir, monkeypatch):
    monkeypatch.setattr(mnist_tfds, "_run", lambda *_: pytest.fail("prepared again"))
    with cache.locked(data_dir):
        second = threading.Thread(target=mnist_tfds.prepare, args=(data_dir,))
        second.start()
        time.sleep(0.3)
        assert second.is_alive(), "did not wait"
        shutil.copytree(prepared / "mnist", data_dir / "mnist")
    second.join(timeout=30)
    assert not second.is_alive()
    assert mnist_tfds.is_prepared(data_dir)


def test_something_else_in_the_place_of_the_dataset_is_kept(data_dir):
    (data_dir / "mnist" / "3.0.1").mkdir(parents=True)
    (data_dir / "mnist" / "3.0.1" / "mine").write_text("mine")
    with pytest.raises(
        DataError, match=r"holds no dataset_info\.json.*move or delete it"
    ):
        mnist.load("mnist", data_dir)
    assert (data_dir / "mnist" / "3.0.1" / "mine").read_text() == "mine"
    assert contents(data_dir) == ["downloads", "mnist"]


def test_a_directory_that_cannot_be_written_is_explained(original_files, monkeypatch):
    monkeypatch.setattr(mnist_tfds, "_has_manual_files", lambda _: True)
    with pytest.raises(DataError, match=r"cannot write /proc/mpjax.*--data-dir one of"):
        mnist_tfds.prepare(Path("/proc/mpjax"))


@pytest.mark.weekly
@pytest.mark.parametrize("file_format", ["tfrecord", "parquet", "riegeli"])
def test_another_format_is_explained(file_format, copied):
    path = copied / "mnist" / "3.0.1" / "dataset_info.json"
    info = json.loads(path.read_text())
    assert info["fileFormat"] == "array_record"
    path.write_text(json.dumps(info | {"fileFormat": file_format}))
    message = rf"is prepared as {file_format}.*='array_record'.*leave the flag out"
    with pytest.raises(DataError, match=message):
        mnist.load("mnist", copied)


def overwrite(path: Path, start: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)


@pytest.mark.weekly
@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: overwrite(directory / RECORDS, 1_000_000, bytes(1000)),
        lambda directory: os.truncate(directory / RECORDS, 1_000_000),
        lambda directory: os.truncate(directory / RECORDS, 0),
        lambda directory: (directory / RECORDS).unlink(),
        lambda directory: (directory / "mnist/3.0.1/features.json").write_text("{"),
        lambda directory: (directory / "mnist/3.0.1/features.json").unlink(),
        lambda directory: (directory / "mnist/3.0.1/dataset_info.json").write_text(""),
    ],
    ids=["records", "half", "empty", "none", "features", "no features", "info"],
)
def test_damaged_files_are_explained(damage, copied):
    damage(copied)
    with pytest.raises(
        DataError, match=r"cannot read .*3\.0\.1.*delete that directory"
    ):
        mnist.load("mnist", copied)


@pytest.mark.weekly
@pytest.mark.parametrize(
    "missing", ["tensorflow_datasets", "array_record", "PIL.Image"]
)
def test_a_missing_library_is_explained(missing, monkeypatch, prepared):
    monkeypatch.setitem(sys.modules, missing, None)
    for use in (mnist_tfds.read, mnist_tfds.prepare):
        with pytest.raises(DataError, match=rf"{missing}.*pip install 'mpjax\[exp"):
            use(prepared)
