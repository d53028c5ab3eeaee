"""LibriSpeech in its own layout, as it comes and when it is damaged."""

import shutil
from pathlib import Path

import pytest

from experiments.data.speech.librispeech import load_librispeech
from experiments.data.speech.selection import select
from experiments.harness.errors import AudioError, DataError

# Subset -> speaker-chapter -> texts.
SUBSETS = {
    "train-clean-100": {"103-1240": ["CHAPTER ONE", "IT'S A HOUSE"], "26-495": ["NO"]},
    "train-other-500": {"20-205": ["YES"]},
    "dev-clean": {"84-121123": ["GO"]},
    "test-clean": {"61-70968": ["HE BEGAN", "A CONFUSED COMPLAINT"]},
    "test-other": {"367-130732": ["LOBSTERS"]},
}


@pytest.fixture
def data_dir(tmp_path, record) -> Path:
    """The folder that holds `LibriSpeech`."""
    root = tmp_path / "corpora" / "LibriSpeech"
    for subset, chapters in SUBSETS.items():
        for name, texts in chapters.items():
            chapter = root / subset / name.replace("-", "/")
            ids = [f"{name}-{index:04}" for index in range(len(texts))]
            for index, item in enumerate(ids):
                record(chapter / f"{item}.flac", 0.2 * (1 + index))
            lines = [f"{item} {text}\n" for item, text in zip(ids, texts, strict=True)]
            (chapter / f"{name}.trans.txt").write_text("".join(lines))
    (root / "README.TXT").touch()
    return root.parent


def texts(split) -> list[str]:
    return [split[index].text for index in range(len(split))]


def test_the_clean_subsets_are_the_default(data_dir, capsys):
    corpus = load_librispeech(data_dir)
    assert (corpus.name, corpus.unit) == ("LibriSpeech", "characters")
    assert corpus.has_words
    assert texts(corpus.train) == ["CHAPTER ONE", "IT'S A HOUSE", "NO", "YES"]
    assert texts(corpus.val) == ["GO"]
    assert texts(corpus.test) == ["HE BEGAN", "A CONFUSED COMPLAINT"]
    second = corpus.train[1]
    assert (second.id, second.speaker) == ("103-1240-0001", "103")
    assert second.duration_s == 0.4
    assert corpus.train.samples(1).shape == (6_400,)
    assert capsys.readouterr().err == ""


def test_subsets_may_be_named_and_the_folder_itself_given(data_dir):
    corpus = load_librispeech(
        data_dir / "LibriSpeech",
        train=["train-other-500"],
        test=["test-other", "test-clean"],
    )
    assert texts(corpus.train) == ["YES"]
    assert texts(corpus.test) == ["LOBSTERS", "HE BEGAN", "A CONFUSED COMPLAINT"]


@pytest.mark.parametrize("subset", ["dev-clean", "test-clean", "train-*"])
def test_a_missing_subset_is_explained(subset, data_dir):
    for path in (data_dir / "LibriSpeech").glob(subset):
        shutil.rmtree(path)
    message = rf"holds no subset {subset.replace('*', '.*')}; it holds .*test-other"
    with pytest.raises(DataError, match=message):
        load_librispeech(data_dir)


def test_a_subset_that_is_named_wrongly_is_explained(data_dir):
    with pytest.raises(DataError, match="no subset dev; it holds dev-clean, test-clea"):
        load_librispeech(data_dir, val=["dev"])
    with pytest.raises(DataError, match="a subset is named twice"):
        load_librispeech(data_dir, val=["test-clean"])
    with pytest.raises(DataError, match=r"expected at least one subset .* for val"):
        load_librispeech(data_dir, val=[])


def test_an_empty_subset_is_explained(data_dir):
    shutil.rmtree(data_dir / "LibriSpeech" / "dev-clean" / "84")
    with pytest.raises(DataError, match=r"dev-clean holds no recordings: expected SP"):
        load_librispeech(data_dir)


def test_a_path_that_does_not_exist_is_explained(tmp_path):
    with pytest.raises(DataError, match="nowhere is no folder; point --data-dir to"):
        load_librispeech(tmp_path / "nowhere")


def test_what_lacks_its_text_or_audio_is_counted(data_dir, capsys):
    train = data_dir / "LibriSpeech" / "train-clean-100"
    (train / "26/495/26-495.trans.txt").unlink()
    (train / "103/1240/103-1240-0000.flac").unlink()
    assert texts(load_librispeech(data_dir).train) == ["IT'S A HOUSE", "YES"]
    assert "train-clean-100: 2 recordings without a text" in capsys.readouterr().err


def test_a_transcript_that_is_no_text_is_explained(data_dir):
    path = data_dir / "LibriSpeech/dev-clean/84/121123/84-121123.trans.txt"
    path.write_bytes(b"84-121123-0000 \xff\xfe")
    with pytest.raises(DataError, match=r"trans\.txt cannot be read .*expected UTF-8"):
        load_librispeech(data_dir)


def test_an_unreadable_recording_names_its_file(data_dir):
    path = data_dir / "LibriSpeech/train-clean-100/26/495/26-495-0000.flac"
    path.write_bytes(b"fLaC, and nothing more")
    train = load_librispeech(data_dir).train
    with pytest.raises(AudioError, match=r"26-495-0000\.flac cannot be read"):
        select(train)
    assert select(train, skip_bad=True).summary() == "3 kept, 1 unreadable"
