"""Recordings in the cache: read as written, damage found, sent to other processes."""

import concurrent.futures
import errno
import os
import pickle

import numpy as np
import pytest

from experiments.data.speech import stored
from experiments.data.speech.corpus import Utterance, Utterances
from experiments.harness.errors import AudioError, DataError

RNG = np.random.default_rng(0)
TOLD = [
    stored.Recording(split, text, "m3", RNG.integers(-9000, 9000, n, np.int16))
    for split, text, n in [
        ("train", "hao", 1600),
        ("test", "ni", 800),
        ("train", "你好", 3200),
        ("val", "ba", 400),
    ]
]


@pytest.fixture
def path(tmp_path):
    stored.write(tmp_path / "a.npy", iter(TOLD), 10_000)
    return tmp_path / "a.npy"


def test_what_is_written_is_read(path):
    splits = stored.read(path)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 2,
        "val": 1,
        "test": 1,
    }
    train: Utterances = splits["train"]
    assert train[0] == Utterance("train-000000", "hao", "m3", 0.1)
    assert train[1] == train[-1] == Utterance("train-000001", "你好", "m3", 0.2)
    for utterances, index, told in [
        (train, 0, TOLD[0]),
        (splits["test"], 0, TOLD[1]),
        (train, 1, TOLD[2]),
        (splits["val"], 0, TOLD[3]),
    ]:
        samples = utterances.samples(index)
        assert samples.dtype == np.float32
        assert np.array_equal(samples * 32768, told.samples)
    with pytest.raises(IndexError):
        train[2]
    with pytest.raises(IndexError):
        train.samples(2)
    assert np.array_equal(train.samples(-1), train.samples(1))
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.npy", "a.npz"]


def test_the_file_is_an_array_that_numpy_reads(path):
    array = np.load(path)
    assert array.dtype == np.int16
    assert np.array_equal(array, np.concatenate([told.samples for told in TOLD]))


def test_a_pickle_holds_no_audio_and_works_elsewhere(path):
    train = stored.read(path)["train"]
    before = train.samples(1)
    content = pickle.dumps(train)
    assert len(content) < 2000
    assert np.array_equal(pickle.loads(content).samples(1), before)


def test_threads_read_at_once(path):
    train = stored.read(path)["train"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for samples in pool.map(train.samples, [0] * 50):
            assert np.array_equal(samples * 32768, TOLD[0].samples)


def test_nothing_written_is_none(tmp_path):
    assert stored.read(tmp_path / "a.npy") is None


@pytest.mark.parametrize("at", [0, 5, 130, -1])
def test_a_flipped_bit_is_found(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npy is not what was written"):
        stored.read(path)


def test_lost_or_cut_files_are_found(path):
    index = path.with_suffix(".npz").read_bytes()
    path.with_suffix(".npz").write_bytes(index[:-30])
    with pytest.raises(DataError):
        stored.read(path)
    path.with_suffix(".npz").write_bytes(index)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="not what was written"):
        stored.read(path)
    path.unlink()
    with pytest.raises(DataError, match="FileNotFoundError"):
        stored.read(path)


def test_audio_that_goes_while_it_is_used_is_an_audio_error(path):
    train = stored.read(path)["train"]
    path.unlink()
    with pytest.raises(AudioError, match=r"a\.npy cannot be read.*run again"):
        train.samples(0)


def test_an_interrupt_halfway_leaves_what_was_there(path):
    def interrupted():
        yield TOLD[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored.write(path, interrupted(), 0)
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.npy", "a.npz"]
    assert len(stored.read(path)["train"]) == 2


def test_a_new_file_with_the_old_index_is_damaged(path, monkeypatch):
    def no_room(*_):
        raise DataError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(stored.cache, "write_npz", no_room)
        with pytest.raises(DataError, match="no room"):
            stored.write(path, iter(TOLD[:2]), 0)
    with pytest.raises(DataError, match="not what was written"):
        stored.read(path)


def test_a_full_disk_says_how_much_room_is_needed(tmp_path, small_disk):
    long = [TOLD[0]._replace(samples=np.ones(600_000, np.int16))]
    with (
        small_disk(),
        pytest.raises(DataError, match=r"make room \(2 MB are needed\)") as caught,
    ):
        stored.write(tmp_path / "a.npy", iter(long), 1_200_000)
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
