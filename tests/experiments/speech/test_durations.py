"""Durations come from headers, and are kept until a recording changes."""

import os
import pickle
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from experiments.data.speech import durations
from experiments.data.speech.durations import recorded
from experiments.data.speech.recordings import RecordedUtterances, Recording
from experiments.harness.errors import AudioError


@pytest.fixture
def recordings(tmp_path, record, monkeypatch):
    monkeypatch.setattr(durations, "MIN_CACHED", 2)
    return [
        Recording(
            str(index), "a", "", str(record(tmp_path / f"{index}.wav", 0.1 + index))
        )
        for index in range(3)
    ]


def seconds(utterances) -> list[float]:
    return [utterances[index].duration_s for index in range(len(utterances))]


@pytest.fixture
def measured(monkeypatch):
    """The names of the recordings that are measured from now on."""
    names = []
    duration_s = Recording.duration_s

    def spy(self):
        names.append(self.id)
        return duration_s(self)

    monkeypatch.setattr(Recording, "duration_s", spy)
    return names


def test_durations_are_measured_once(recordings, measured, speech_cache):
    assert seconds(recorded(recordings, name="test")) == [0.1, 1.1, 2.1]
    assert measured == ["0", "1", "2"]
    assert seconds(recorded(recordings, name="test")) == [0.1, 1.1, 2.1]
    assert len(measured) == 3
    files = [path.name for path in speech_cache.glob("*.npz")]
    assert len(files) == 1
    assert files[0].startswith("durations-test-")


def test_a_changed_recording_is_measured_anew(recordings, record, measured):
    recorded(recordings, name="test")
    record(Path(recordings[1].path), 3.0)
    assert seconds(recorded(recordings, name="test")) == [0.1, 3.0, 2.1]
    os.utime(recordings[0].path, ns=(1, 1))
    del measured[:]
    recorded(recordings, name="test")
    assert measured == ["0", "1", "2"]
    os.unlink(recordings[2].path)
    assert np.isnan(recorded(recordings, name="test")[2].duration_s)


def test_what_could_not_be_read_is_tried_again(recordings, measured, monkeypatch):
    with monkeypatch.context() as patch:
        broken = AudioError("the disk is away")
        patch.setattr(Recording, "duration_s", Mock(side_effect=broken))
        assert np.isnan(seconds(recorded(recordings, name="test"))).all()
    assert seconds(recorded(recordings, name="test")) == [0.1, 1.1, 2.1]
    assert measured == ["0", "1", "2"]
    assert seconds(recorded(recordings, name="test")) == [0.1, 1.1, 2.1]
    assert len(measured) == 3


@pytest.mark.parametrize("damage", ["cut", "shape", "name"])
def test_a_damaged_cache_is_measured_anew(damage, recordings, speech_cache, capsys):
    recorded(recordings, name="test")
    (path,) = speech_cache.glob("*.npz")
    if damage == "cut":
        os.truncate(path, 100)
    elif damage == "shape":
        np.savez(path, duration_s=np.zeros(7))
    else:
        np.savez(path, other=np.zeros(3))
    assert seconds(recorded(recordings, name="test")) == [0.1, 1.1, 2.1]
    assert "measuring anew" in capsys.readouterr().err
    assert seconds(recorded(recordings, name="test")) == [0.1, 1.1, 2.1]
    assert "measuring anew" not in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_reported(recordings, monkeypatch, capsys):
    monkeypatch.setenv("MPJAX_DATA_DIR", "/proc/mpjax")
    assert seconds(recorded(recordings, name="test")) == [0.1, 1.1, 2.1]
    assert "the durations of test are not kept" in capsys.readouterr().err


def test_few_recordings_leave_no_cache(recordings, monkeypatch, speech_cache):
    monkeypatch.setattr(durations, "MIN_CACHED", 4)
    recorded(recordings, name="test")
    assert not speech_cache.exists()


def test_a_part_of_a_file_is_read(tmp_path, record):
    first = record(tmp_path / "1.wav", 0.3).read_bytes()
    second = record(tmp_path / "2.flac", 0.4, rate_hz=8_000).read_bytes()
    both = tmp_path / "both"
    both.write_bytes(b"abc" + first + second)
    recordings = [
        Recording("1", "a", "", str(both), 3, len(first), "one"),
        Recording("2", "a", "", str(both), 3 + len(first), len(second), "two"),
        Recording("3", "a", "", str(both), 4, len(first), "three"),
    ]
    utterances = recorded(recordings, name="test")
    assert seconds(utterances)[:2] == [0.3, 0.4]
    assert np.isnan(utterances[2].duration_s)
    assert [len(utterances.samples(index)) for index in range(2)] == [4_800, 6_400]


def test_utterances_go_to_worker_processes(recordings):
    utterances = recorded(recordings, name="test")
    copy = pickle.loads(pickle.dumps(utterances))
    assert copy[1] == utterances[1]
    assert np.array_equal(copy.samples(1), utterances.samples(1))


def test_each_recording_needs_a_duration(recordings):
    with pytest.raises(ValueError, match="a duration for each of 3 recordings, got 2"):
        RecordedUtterances(recordings, np.ones(2))
