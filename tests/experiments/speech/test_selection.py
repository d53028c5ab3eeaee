"""What is left out of a split, why, and what is done about recordings that are bad."""

import numpy as np
import pytest

from experiments.data.speech.durations import recorded
from experiments.data.speech.recordings import RecordedUtterances, Recording
from experiments.data.speech.selection import check_audio, select
from experiments.harness.errors import AudioError, DataError

DURATIONS_S = [0.2, 0.5, 1.0, 2.0, 4.0]


@pytest.fixture
def folder(tmp_path, record):
    for index, duration_s in enumerate(DURATIONS_S):
        record(tmp_path / f"{index}.wav", duration_s)
    return tmp_path


def utterances(folder, texts="abcde") -> RecordedUtterances:
    recordings = [
        Recording(str(index), text, "anna", str(folder / f"{index}.wav"))
        for index, text in enumerate(texts)
    ]
    return recorded(recordings, name="test")


def ids(selection) -> list[str]:
    return [selection[index].id for index in range(len(selection))]


def test_all_are_kept_by_default(folder):
    selection = select(utterances(folder))
    assert ids(selection) == list("01234")
    assert selection.left_out == {}
    assert selection.summary() == "5 kept"
    assert [len(selection.samples(i)) / 16_000 for i in range(5)] == DURATIONS_S


def test_short_and_long_and_silent_ones_are_counted(folder):
    selection = select(
        utterances(folder, ["a", "b", " ", "d", "e"]),
        min_duration_s=0.5,
        max_duration_s=2.0,
    )
    assert ids(selection) == ["1", "3"]
    assert selection.left_out == {"too short": 1, "without text": 1, "too long": 1}
    assert selection.summary() == "2 kept, 1 too short, 1 without text, 1 too long"
    assert selection[1].duration_s == 2.0
    assert len(selection.samples(1)) == 32_000


def test_a_selection_of_a_selection_counts_both(folder):
    first = select(utterances(folder), min_duration_s=0.3)
    second = select(first, min_duration_s=0.7, max_duration_s=3.0)
    assert ids(second) == ["2", "3"]
    assert second.left_out == {"too short": 2, "too long": 1}
    assert len(second.samples(0)) == 16_000


def test_nothing_left_is_an_error(folder):
    with pytest.raises(DataError, match="no utterance is left of 5: 0 kept, 5 too sho"):
        select(utterances(folder), min_duration_s=10.0)


def test_an_unreadable_header_is_an_error_or_skipped(folder, capsys):
    (folder / "1.wav").write_bytes(b"nothing")
    (folder / "3.wav").unlink()
    split = utterances(folder)
    assert np.isnan(split[1].duration_s)
    with pytest.raises(AudioError, match=r"1\.wav cannot be read.*--skip-bad"):
        select(split)
    selection = select(split, max_duration_s=3.0, skip_bad=True)
    assert ids(selection) == ["0", "2"]
    assert selection.left_out == {"unreadable": 2, "too long": 1}
    assert "3.wav cannot be read: No such file" in capsys.readouterr().err


def test_a_recording_that_becomes_readable_needs_another_run(folder, record):
    (folder / "1.wav").write_bytes(b"nothing")
    split = utterances(folder)
    record(folder / "1.wav", 0.5)
    with pytest.raises(AudioError, match="1 could not be read before; run again"):
        select(split)
    assert ids(select(split, skip_bad=True)) == list("0234")
    assert ids(select(utterances(folder))) == list("01234")


@pytest.mark.parametrize("num_threads", [1, 4])
def test_reading_all_finds_what_the_header_hides(num_threads, tmp_path, record, capsys):
    recordings = []
    for index in range(8):
        path = record(tmp_path / f"{index}.flac", 1.0)
        if index in (2, 5):
            path.write_bytes(path.read_bytes()[:-500])
        recordings.append(Recording(str(index), "a", "", str(path)))
    split = recorded(recordings, name="test")
    assert len(select(split)) == 8
    with pytest.raises(AudioError, match=r"2\.flac .*--skip-bad"):
        check_audio(split, num_threads=num_threads)
    selection = check_audio(split, skip_bad=True, num_threads=num_threads)
    assert ids(selection) == ["0", "1", "3", "4", "6", "7"]
    assert selection.left_out == {"unreadable": 2}
    assert capsys.readouterr().err.count("skipped: ") == 2


def test_many_bad_recordings_are_summed_up(tmp_path, record, capsys):
    paths = [tmp_path / f"{index}.wav" for index in range(9)]
    record(paths[0])
    recordings = [Recording(path.name, "a", "", str(path)) for path in paths]
    selection = select(recorded(recordings, name="test"), skip_bad=True)
    assert selection.left_out == {"unreadable": 8}
    assert "skipped: 3 more recordings" in capsys.readouterr().err
    for path in paths:
        path.unlink(missing_ok=True)
    with pytest.raises(DataError, match="no utterance is left of 1: 0 kept, 9 unread"):
        check_audio(selection, skip_bad=True)
