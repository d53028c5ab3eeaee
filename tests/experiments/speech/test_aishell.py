"""AISHELL-1 in its own layout, as it comes and when it is damaged."""

import gzip
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from experiments.data.speech import archives
from experiments.data.speech.aishell import load_aishell
from experiments.harness.errors import DataError

# Speaker -> split and text of each of its recordings; "-" has no transcript.
SPEAKERS = {
    "S0002": ("train", ["而 对 楼市 成交", "银行 行长", "-"]),
    "S0003": ("train", ["女 旅客 的 Ｔ恤"]),
    "S0724": ("dev", ["广州 市 房地产"]),
    "S0764": ("test", ["甚至 出现 交易", "几乎 停滞 的 情况"]),
}


def utterance_id(speaker: str, index: int) -> str:
    return f"BAC009{speaker}W{index + 122:04}"


@pytest.fixture
def data_dir(tmp_path, record) -> Path:
    """The folder that holds `data_aishell`, unpacked."""
    root = tmp_path / "corpora" / "data_aishell"
    lines = ["BAC009S9999W0001 没有 录音"]
    for speaker, (split, texts) in SPEAKERS.items():
        for index, text in enumerate(texts):
            name = utterance_id(speaker, index)
            record(root / "wav" / split / speaker / f"{name}.wav", 0.3 + 0.1 * index)
            lines += [f"{name} {text}"] if text != "-" else []
    transcript = root / "transcript" / "aishell_transcript_v0.8.txt"
    transcript.parent.mkdir()
    transcript.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root.parent


def pack(data_dir: Path, *speakers: str) -> None:
    """Packs speakers into the archives that the corpus comes with."""
    wav = data_dir / "data_aishell" / "wav"
    for speaker in speakers:
        split = SPEAKERS[speaker][0]
        with tarfile.open(wav / f"{speaker}.tar.gz", "w:gz") as archive:
            for path in sorted((wav / split / speaker).iterdir(), reverse=True):
                archive.add(path, f"{split}/{speaker}/{path.name}")
        shutil.rmtree(wav / split / speaker)
        if not any((wav / split).iterdir()):
            (wav / split).rmdir()


def contents(corpus):
    """Returns everything that a corpus says and sounds like, by split."""
    return [
        [(split[index], split.samples(index).tolist()) for index in range(len(split))]
        for split in (corpus.train, corpus.val, corpus.test)
    ]


def texts(split) -> list[str]:
    return [split[index].text for index in range(len(split))]


def test_splits_speakers_and_characters(data_dir, capsys):
    corpus = load_aishell(data_dir)
    assert (corpus.name, corpus.unit) == ("AISHELL-1", "characters")
    assert not corpus.has_words
    assert texts(corpus.train) == ["而对楼市成交", "银行行长", "女旅客的Ｔ恤"]
    assert texts(corpus.val) == ["广州市房地产"]
    assert texts(corpus.test) == ["甚至出现交易", "几乎停滞的情况"]
    second = corpus.test[1]
    assert (second.id, second.speaker) == ("BAC009S0764W0123", "S0764")
    assert second.duration_s == 0.4
    assert corpus.test.samples(1).shape == (6_400,)
    report = capsys.readouterr().err.splitlines()
    assert report == [
        "AISHELL-1: 1 of 7 recordings have no text and are left out",
        "AISHELL-1: 1 of 7 texts have no recording",
    ]


def test_the_folder_itself_may_be_named(data_dir):
    outer = load_aishell(data_dir)
    inner = load_aishell(str(data_dir / "data_aishell"))
    assert contents(outer) == contents(inner)


def test_pinyin_without_and_with_tones(data_dir):
    corpus = load_aishell(data_dir, unit="pinyin")
    assert corpus.unit == "pinyin letters"
    assert texts(corpus.train) == [
        "er dui lou shi cheng jiao",
        "yin hang hang zhang",
        "nv lv ke de t xu",
    ]
    corpus = load_aishell(data_dir, unit="pinyin-tones")
    assert corpus.unit == "pinyin letters and tones"
    assert texts(corpus.train)[1:] == [
        "yin2 hang2 hang2 zhang3",
        "nv3 lv3 ke4 de5 t xu4",
    ]


@pytest.mark.parametrize("speakers", [list(SPEAKERS), ["S0003"], ["S0764"]], ids=len)
def test_archives_are_read_as_unpacked_files_are(speakers, data_dir, speech_cache):
    expected = contents(load_aishell(data_dir))
    pack(data_dir, *speakers)
    assert contents(load_aishell(data_dir)) == expected
    tars = sorted(path.name for path in speech_cache.glob("aishell/*.tar"))
    assert [name[:5] for name in tars] == sorted(speakers)


def test_archives_are_decompressed_once(data_dir, monkeypatch):
    pack(data_dir, *SPEAKERS)
    expected = contents(load_aishell(data_dir))
    monkeypatch.setattr(archives, "_decompress", lambda *_: pytest.fail("again"))
    assert contents(load_aishell(data_dir)) == expected


def test_an_archive_beside_its_unpacked_folder_is_left_alone(data_dir, speech_cache):
    expected = contents(load_aishell(data_dir))
    wav = data_dir / "data_aishell" / "wav"
    (wav / "S0002.tar.gz").write_bytes(b"damaged, but not needed")
    assert contents(load_aishell(data_dir)) == expected
    assert not speech_cache.exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "cut inside"])
def test_a_damaged_archive_is_explained(damage, data_dir, speech_cache):
    pack(data_dir, "S0002")
    path = data_dir / "data_aishell" / "wav" / "S0002.tar.gz"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[len(content) // 2] ^= 255
    elif damage == "text":
        content = bytearray(b"not an archive")
    else:
        content = bytearray(gzip.compress(gzip.decompress(content)[:10_000]))
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"S0002\.tar\.gz is damaged .*download"):
        load_aishell(data_dir)
    assert [path.name for path in (speech_cache / "aishell").iterdir()] == [".lock"]


def test_a_full_disk_is_explained(data_dir, small_disk, speech_cache):
    wav = data_dir / "data_aishell" / "wav"
    noise = np.random.default_rng(0).bytes(2_000_000)
    (wav / "train" / "S0002" / "noise.wav").write_bytes(noise)
    pack(data_dir, "S0002")
    with (
        small_disk(),
        pytest.raises(DataError, match=r"S0002\.tar\.gz cannot be unpacked.*20 GB"),
    ):
        load_aishell(data_dir)
    assert [path.name for path in (speech_cache / "aishell").iterdir()] == [".lock"]


def test_a_damaged_copy_in_the_cache_is_explained(data_dir, speech_cache):
    pack(data_dir, "S0002")
    load_aishell(data_dir)
    (tar,) = speech_cache.glob("aishell/*.tar")
    os.truncate(tar, 10_000)
    with pytest.raises(DataError, match=rf"{tar} is damaged.*delete it and run again"):
        load_aishell(data_dir)


def test_an_archive_escapes_into_no_folder(data_dir, tmp_path):
    """Members are ranges of bytes: links and paths that climb up do nothing."""
    pack(data_dir, "S0002")
    wav = data_dir / "data_aishell" / "wav"
    with tarfile.open(wav / "S0009.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("train/S0002/BAC009S0002W0122.wav")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
        archive.addfile(tarfile.TarInfo("../../escaped.wav"))
    assert len(load_aishell(data_dir).train) == 3
    assert not list(tmp_path.rglob("escaped*"))


def test_a_missing_transcript_is_explained(data_dir):
    shutil.rmtree(data_dir / "data_aishell" / "transcript")
    with pytest.raises(DataError, match=r"holds no AISHELL-1: expected .*v0\.8\.txt"):
        load_aishell(data_dir)
    (data_dir / "data_aishell.tgz").touch()
    with pytest.raises(DataError, match=r"tar xzf data_aishell\.tgz"):
        load_aishell(data_dir)


def test_a_path_that_does_not_exist_is_explained(tmp_path):
    with pytest.raises(DataError, match="nowhere holds no AISHELL-1: expected"):
        load_aishell(tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_missing_split_is_explained(split, data_dir):
    shutil.rmtree(data_dir / "data_aishell" / "wav" / split)
    with pytest.raises(DataError, match=f"no recordings with a text for {split}: exp"):
        load_aishell(data_dir)


def test_a_transcript_in_another_encoding_is_explained(data_dir):
    path = data_dir / "data_aishell" / "transcript" / "aishell_transcript_v0.8.txt"
    path.write_text("BAC009S0002W0122 而 对\n", encoding="gb18030")
    with pytest.raises(DataError, match=r"v0\.8\.txt cannot be read .*expected UTF-8"):
        load_aishell(data_dir)


def test_a_recording_that_is_there_twice_is_explained(data_dir):
    wav = data_dir / "data_aishell" / "wav"
    shutil.copytree(wav / "test" / "S0764", wav / "train" / "S0764")
    with pytest.raises(DataError, match="BAC009S0764W0122 is there 2 times"):
        load_aishell(data_dir)


def test_an_unknown_unit_and_a_missing_library_are_explained(data_dir, monkeypatch):
    with pytest.raises(DataError, match="'tones' is none of characters, pinyin, pin"):
        load_aishell(data_dir, unit="tones")
    monkeypatch.setitem(sys.modules, "pypinyin", None)
    with pytest.raises(DataError, match=r'pypinyin.*pip install -e "\.\[speech\]"'):
        load_aishell(data_dir, unit="pinyin")
    assert load_aishell(data_dir).unit == "characters"
