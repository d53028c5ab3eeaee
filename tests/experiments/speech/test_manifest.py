"""The user's own recordings, by a manifest that is right or wrong."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from experiments.data.speech.manifest import load_manifest
from experiments.data.speech.selection import select
from experiments.harness.errors import AudioError, DataError


@pytest.fixture
def write(tmp_path, record):
    """Writes a manifest of objects or raw lines, and the recordings they name."""

    def write_lines(*entries) -> Path:
        lines = []
        for entry in entries:
            if isinstance(entry, dict) and isinstance(entry.get("audio"), str):
                record(tmp_path / "own" / entry["audio"], 0.3, rate_hz=44_100)
            text = entry if isinstance(entry, str) else json.dumps(entry)
            lines.append(text)
        path = tmp_path / "own" / "voices.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write_lines


def line(name, text="a b", **more):
    return {"audio": f"clips/{name}.wav", "text": text, **more}


def ids(split) -> list[str]:
    return [split[index].id for index in range(len(split))]


def speakers(split) -> set[str]:
    return {split[index].speaker for index in range(len(split))}


def test_lines_with_splits(write):
    path = write(
        line(1, "你好", split="train", speaker="anna"),
        "",
        line(2, split="val"),
        line(3, split="test", duration=7.0),
        line(4, split="train"),
    )
    corpus = load_manifest(str(path))
    assert (corpus.name, corpus.unit) == ("voices", "characters")
    assert corpus.has_words
    assert ids(corpus.train) == ["clips/1.wav", "clips/4.wav"]
    assert (ids(corpus.val), ids(corpus.test)) == (["clips/2.wav"], ["clips/3.wav"])
    assert corpus.train[0] == ("clips/1.wav", "你好", "anna", 0.3)
    assert corpus.train[1].speaker == ""
    assert corpus.train.samples(0).shape == (4_800,)


def test_paths_may_be_absolute_and_the_file_may_begin_with_a_mark(write, record):
    path = write(line(1), line(2))
    elsewhere = record(path.parent.parent / "elsewhere.flac", num_channels=2)
    lines = (
        path.read_text() + "\r\n" + json.dumps(line("x") | {"audio": f"{elsewhere}"})
    )
    path.write_text("\ufeff" + lines + "\r\n")
    corpus = load_manifest(path)
    everything = ids(corpus.train) + ids(corpus.val) + ids(corpus.test)
    assert sorted(everything) == sorted(["clips/1.wav", "clips/2.wav", str(elsewhere)])


def many(num_speakers, num_each):
    return [
        line(f"{speaker}-{index}", speaker=f"s{speaker}")
        for speaker in range(num_speakers)
        for index in range(num_each)
    ]


def test_speakers_are_held_out(write):
    corpus = load_manifest(write(*many(20, 3)))
    splits = [corpus.train, corpus.val, corpus.test]
    assert [len(split) for split in splits] == [48, 6, 6]
    assert [len(speakers(split)) for split in splits] == [16, 2, 2]
    assert len(speakers(corpus.train) | speakers(corpus.val)) == 18


def test_the_split_depends_on_the_seed_and_not_on_the_order(write):
    lines = many(10, 2)
    expected = load_manifest(write(*lines))
    random.Random(0).shuffle(lines)
    again = load_manifest(write(*lines))
    assert speakers(again.test) == speakers(expected.test)
    assert speakers(again.val) == speakers(expected.val)
    others = {
        frozenset(speakers(load_manifest(write(*lines), seed=seed).test))
        for seed in range(5)
    }
    assert len(others) > 1


def test_without_speakers_utterances_are_held_out(write, capsys):
    corpus = load_manifest(write(*(line(index) for index in range(30))))
    assert [len(corpus.train), len(corpus.val), len(corpus.test)] == [24, 3, 3]
    assert capsys.readouterr().err == ""


def test_two_speakers_cannot_be_held_out(write, capsys):
    corpus = load_manifest(write(*many(2, 5)))
    assert [len(corpus.train), len(corpus.val), len(corpus.test)] == [8, 1, 1]
    assert "voices.jsonl has fewer than three speakers" in capsys.readouterr().err


@pytest.mark.parametrize("num_each", [1, 50])
def test_three_speakers_are_one_for_each_set(num_each, write):
    corpus = load_manifest(write(*many(3, num_each)))
    assert [len(corpus.train), len(corpus.val), len(corpus.test)] == [num_each] * 3


@pytest.mark.parametrize("seed", range(4))
def test_one_speaker_with_most_lines_leaves_no_set_empty(seed, write):
    others = [line(f"x{speaker}", speaker=f"x{speaker}") for speaker in range(2)]
    corpus = load_manifest(write(*many(1, 30), *others), seed=seed)
    assert min(len(corpus.train), len(corpus.val), len(corpus.test)) == 1
    assert len(corpus.train) + len(corpus.val) + len(corpus.test) == 32


def test_hanzi_have_no_words(write):
    corpus = load_manifest(write(*(line(index, "你好") for index in range(3))))
    assert not corpus.has_words


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"line 2 is not JSON \(.*expected a line such as"),
        ('["a"]', "line 2: expected an object"),
        ({"text": "a"}, "line 2 has no 'audio', only 'text'; expected a line"),
        ({"audio": "a.wav", "speaker": "x"}, "line 2 has no 'text', only 'audio', 'sp"),
        ("{}", "line 2 has no 'audio', only nothing"),
        (line(2, text=None), "line 2: text is None; expected a string"),
        (line(2, speaker=7), "line 2: speaker is 7; expected a string"),
        ({"audio": 3, "text": "a"}, "line 2: audio is 3; expected a string"),
        ('{"audio": "", "text": "a"}', "line 2: audio is empty"),
        (line(2, split="dev"), "line 2: split 'dev' is none of train, val, test"),
        (line(2, split="val"), "line 2: expected a split in every line, or in none"),
        (line(1), r"line 2: clips/1\.wav is listed in line 1 too"),
        (line("../clips/1"), r"line 2: clips/\.\./clips/1\.wav is listed in line 1"),
    ],
)
def test_a_wrong_line_is_named(bad, message, write):
    path = write(line(1), bad, line(3))
    with pytest.raises(DataError, match=rf"voices\.jsonl, {message}"):
        load_manifest(path)


@pytest.mark.parametrize("missing", ["train", "val", "test"])
def test_a_missing_split_is_named(missing, write):
    there = [split for split in ("train", "val", "test") if split != missing]
    path = write(*(line(split, split=split) for split in there))
    with pytest.raises(DataError, match=f"no line of the split '{missing}'"):
        load_manifest(path)


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_an_empty_manifest_is_explained(lines, write):
    with pytest.raises(DataError, match=r"voices\.jsonl is empty; expected lines such"):
        load_manifest(write(*lines))


def test_too_few_lines_are_explained(write):
    with pytest.raises(DataError, match="holds 2 utterances; expected three or more"):
        load_manifest(write(line(1), line(2)))


def test_a_manifest_that_cannot_be_read_is_explained(write, tmp_path):
    with pytest.raises(DataError, match="nowhere cannot be read: No such file"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load_manifest(tmp_path)
    path = write(line(1))
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(DataError, match=r"cannot be read: .*expected a UTF-8 file"):
        load_manifest(path)


def test_a_missing_recording_names_its_line(write):
    path = write(*(line(index, split="train") for index in range(3)))
    more = [line("v", split="val"), line("t", split="test")]
    path.write_text("\n".join([path.read_text(), *map(json.dumps, more)]))
    (path.parent / "clips" / "1.wav").unlink()
    corpus = load_manifest(path)
    message = r"voices\.jsonl, line 2: .*clips/1\.wav cannot be read: No such file"
    with pytest.raises(AudioError, match=message):
        select(corpus.train)
    with pytest.raises(AudioError, match=message):
        corpus.train.samples(1)
    assert select(corpus.train, skip_bad=True).summary() == "2 kept, 1 unreadable"
    with pytest.raises(AudioError, match="line 4: "):
        select(corpus.val)
