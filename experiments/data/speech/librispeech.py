"""LibriSpeech, up to 960 hours of read English, from its own layout.

    LibriSpeech/train-clean-100/103/1240/103-1240.trans.txt   103-1240-0000 CHAPTER …
    LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac

Source: V. Panayotov et al., Librispeech: an ASR corpus based on public domain audio
books, ICASSP 2015; https://www.openslr.org/12.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.data import cache
from experiments.data.speech.corpus import Corpus
from experiments.data.speech.durations import recorded
from experiments.data.speech.recordings import RecordedUtterances, Recording
from experiments.harness.errors import DataError

TRANSCRIPT_SUFFIX = ".trans.txt"


def load_librispeech(
    data_dir: str | os.PathLike[str],
    *,
    train: Sequence[str] = (),
    val: Sequence[str] = ("dev-clean",),
    test: Sequence[str] = ("test-clean",),
) -> Corpus:
    """Finds the recordings of LibriSpeech and their texts, in capital letters.

    Args:
      data_dir: `LibriSpeech`, or the folder that holds it.
      train: subsets to train on; by default every subset `train-*` that is there.
      val: subsets that are evaluated after every epoch.
      test: subsets that are evaluated at the end.

    Raises:
      DataError: if a subset is missing or holds no recordings, a subset is named twice,
        or a transcript cannot be read.
    """
    root = _root(Path(data_dir))
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    train = train or [name for name in there if name.startswith("train-")]
    named = [*train, *val, *test]
    if missing := [name for name in named if name not in there]:
        raise DataError(_not_there(root, missing[0], there))
    if not train:
        raise DataError(_not_there(root, "train-*", there))
    for split, subsets in (("val", val), ("test", test)):
        if not subsets:
            raise DataError(f"expected at least one subset of LibriSpeech for {split}.")
    if len(set(named)) < len(named):
        raise DataError(f"a subset is named twice: {', '.join(named)}.")
    splits = [_read_split(root, subsets) for subsets in (train, val, test)]
    name = "LibriSpeech"
    return Corpus(name, *splits, unit="characters", has_words=True)


def _root(data_dir: Path) -> Path:
    inner = data_dir / "LibriSpeech"
    root = inner if inner.is_dir() else data_dir
    if not root.is_dir():
        raise DataError(
            f"{data_dir} is no folder; point --data-dir to LibriSpeech or to the "
            "folder that holds it (https://www.openslr.org/12)."
        )
    return root


def _not_there(root: Path, subset: str, there: list[str]) -> str:
    return (
        f"{root} holds no subset {subset}; it holds {', '.join(there) or 'no folder'}. "
        "Unpack that subset there (https://www.openslr.org/12), or name others."
    )


def _read_split(root: Path, subsets: Sequence[str]) -> RecordedUtterances:
    recordings: list[Recording] = []
    for subset in subsets:
        found = list(_find_recordings(root / subset))
        if not found:
            raise DataError(
                f"{root / subset} holds no recordings: expected SPEAKER/CHAPTER/*.flac "
                f"and *{TRANSCRIPT_SUFFIX} beside them; unpack that subset again."
            )
        recordings += found
    return recorded(recordings, name="+".join(["librispeech", *subsets]))


def _find_recordings(subset: Path) -> Iterator[Recording]:
    """Yields the recordings of a subset in the order of their names."""
    num_missing = 0
    for speaker in _sorted_folders(subset):
        for chapter in _sorted_folders(speaker):
            flacs = {path.stem for path in chapter.glob("*.flac")}
            texts = _read_transcript(chapter, f"{speaker.name}-{chapter.name}")
            num_missing += len(flacs ^ texts.keys())
            for name in sorted(flacs & texts.keys()):
                path = str(chapter / f"{name}.flac")
                yield Recording(name, texts[name], speaker.name, path)
    if num_missing:
        cache.report(
            f"LibriSpeech {subset.name}: {num_missing} recordings without a text, or "
            "texts without a recording, are left out"
        )


def _read_transcript(chapter: Path, name: str) -> dict[str, str]:
    """Returns the texts of a chapter by id; none where there is no transcript."""
    path = chapter / f"{name}{TRANSCRIPT_SUFFIX}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); expected UTF-8 lines of an utterance's "
            "name and its text; unpack that subset again."
        ) from error
    parts = (line.partition(" ") for line in lines if line.strip())
    return {name: text.strip() for name, _, text in parts}


def _sorted_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())
