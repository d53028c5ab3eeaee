"""The cache directory: whole files or none, one writer, nothing unpickled."""

import errno
import os
import pickle
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import filelock
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import cache
from experiments.harness.errors import DataError

ARRAYS = {"x": np.arange(12, dtype=np.uint8).reshape(3, 4), "y": np.arange(3)}
LARGE = {"x": np.ones(3_000_000, np.uint8)}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.npz"
    cache.write_npz(path, ARRAYS)
    assert same(cache.read_npz(path), ARRAYS)
    cache.write_npz(path, LARGE)
    assert same(cache.read_npz(path), LARGE)
    assert names(tmp_path) == ["a.npz"]


def test_others_may_read_what_is_written(tmp_path):
    cache.write_npz(tmp_path / "a.npz", ARRAYS)
    assert stat.S_IMODE((tmp_path / "a.npz").stat().st_mode) == 0o644


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, small_disk):
    path = tmp_path / "a.npz"
    cache.write_npz(path, ARRAYS)
    with (
        small_disk(),
        pytest.raises(DataError, match=r"cannot write .*a\.npz.*make room"),
    ):
        cache.write_npz(path, LARGE)
    assert names(tmp_path) == ["a.npz"]
    assert same(cache.read_npz(path), ARRAYS)


def test_no_space_halfway_leaves_nothing(tmp_path, monkeypatch):
    def write_array(file, array, **_):
        file.write(array.tobytes()[:1_000_000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np.lib.format, "write_array", write_array)
    with pytest.raises(DataError, match="No space left on device; make room"):
        cache.write_npz(tmp_path / "a.npz", LARGE)
    assert names(tmp_path) == []


def test_an_interrupt_halfway_leaves_nothing(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        cache.write_npz(tmp_path / "a.npz", LARGE)
    assert names(tmp_path) == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; import numpy as np\n"
        "from experiments.data import cache\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.write_npz(Path(sys.argv[1]), {'x': np.ones(9)})\n"
    )
    path = tmp_path / "a.npz"
    done = subprocess.run([sys.executable, "-c", script, path], check=False, timeout=60)
    assert done.returncode < 0
    assert len(names(tmp_path)) == 1
    assert names(tmp_path) != ["a.npz"]
    cache.write_npz(path, ARRAYS)
    assert names(tmp_path) == ["a.npz"]


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_place_of_the_directory_is_explained(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(DataError, match=r"move what.*MPJAX_DATA_DIR"),
        cache.locked(tmp_path / "file" / below),
    ):
        pytest.fail("locked")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_that_cannot_be_written_is_explained():
    # Root may write anywhere but there.
    with (
        pytest.raises(DataError, match=r"cannot write /proc/.*make it writable"),
        cache.locked(Path("/proc/mpjax")),
    ):
        pytest.fail("locked")


def test_waiting_for_the_lock_is_reported_and_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.1)
    with filelock.FileLock(tmp_path / ".lock"):
        with (
            pytest.raises(DataError, match=r"another process has held .*\.lock"),
            cache.locked(tmp_path),
        ):
            pytest.fail("locked")
        assert "waiting for the process that holds" in capsys.readouterr().err


def test_the_lock_is_taken_once_the_other_process_releases_it(tmp_path, capsys):
    lock = filelock.FileLock(tmp_path / ".lock", thread_local=False)
    lock.acquire()
    timer = threading.Timer(0.3, lock.release)
    timer.start()
    with cache.locked(tmp_path):
        assert not lock.is_locked
    timer.join()
    assert "waiting" in capsys.readouterr().err
    with cache.locked(tmp_path):  # free again
        pass
    assert capsys.readouterr().err == ""


def small_npz() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        cache.write_npz(Path(folder) / "a.npz", ARRAYS)
        return (Path(folder) / "a.npz").read_bytes()


WHOLE = small_npz()


def read(content: bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        path.write_bytes(content)
        return cache.read_npz(path)


@settings(max_examples=400)
@given(position=st.integers(0, len(WHOLE) - 1), mask=st.integers(1, 255))
def test_any_flipped_byte_is_a_data_error_if_anything(position, mask):
    content = bytearray(WHOLE)
    content[position] ^= mask
    try:
        arrays = read(bytes(content))
    except DataError:
        return
    assert all(isinstance(array, np.ndarray) for array in arrays.values())


@settings(max_examples=100)
@given(size=st.integers(0, len(WHOLE) - 1))
def test_any_truncation_is_a_data_error(size):
    with pytest.raises(DataError):
        read(WHOLE[:size])


class Evil:
    def __reduce__(self):
        return os.mkdir, (Path("evil"),)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", x=np.array([Evil()], object))
    with pytest.raises(DataError, match="allow_pickle"):
        cache.read_npz(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError):
        cache.read_npz(tmp_path / "b.npz")
    assert not (tmp_path / "evil").exists()


def test_nothing_is_pickled(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle=False"):
        cache.write_npz(tmp_path / "a.npz", {"x": np.array([Evil()], object)})
    assert names(tmp_path) == []


def test_an_npy_is_no_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(DataError):
        cache.read_npz(tmp_path / "a.npy")


def test_the_environment_names_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MPJAX_DATA_DIR", str(tmp_path / "here"))
    assert cache.cache_dir() == tmp_path / "here"
    monkeypatch.setenv("MPJAX_DATA_DIR", "~/there")
    assert cache.cache_dir() == tmp_path / "there"
    monkeypatch.setenv("MPJAX_DATA_DIR", "")
    assert cache.cache_dir() == tmp_path / ".cache" / "mpjax"
    monkeypatch.delenv("MPJAX_DATA_DIR")
    assert cache.cache_dir() == tmp_path / ".cache" / "mpjax"


def test_no_home_is_explained(monkeypatch):
    monkeypatch.setenv("MPJAX_DATA_DIR", "~nobody-of-that-name/data")
    with pytest.raises(DataError, match="point MPJAX_DATA_DIR to a directory"):
        cache.cache_dir()
