"""Your own recordings, listed in a manifest: a file of JSON lines.

    {"audio": "clips/1.wav", "text": "ni hao", "speaker": "anna", "split": "train"}

A path is relative to the manifest. `speaker` is optional. `split` is "train", "val" or
"test", in every line or in none: without it whole speakers are held out. Other keys are
ignored.
"""

import json
import os
from pathlib import Path
from typing import Any

from experiments.data.speech.corpus import Corpus
from experiments.data.speech.durations import recorded
from experiments.data.speech.recordings import Recording
from experiments.data.speech.speaker_split import split_by_speaker
from experiments.harness.errors import DataError

SPLITS = ("train", "val", "test")
EXAMPLE = '{"audio": "clips/1.wav", "text": "ni hao"}'


def load_manifest(path: str | os.PathLike[str], *, seed: int = 0) -> Corpus:
    """Reads a manifest. Audio is WAV or FLAC, at any rate and channel count.

    Args:
      path: the manifest.
      seed: which speakers are held out, where the lines name no split.

    Raises:
      DataError: if the manifest is missing or empty, a line is wrong (the message has
        its number), a recording is listed twice, or a split has no utterance.
    """
    manifest = Path(path)
    recordings: list[Recording] = []
    splits: list[str | None] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(_read_lines(manifest), 1):
        if not line.strip():
            continue
        where = f"{manifest}, line {number}"
        recording, split = _parse(line, manifest.parent, where)
        first = line_of.setdefault(recording.path, number)
        if first != number:
            raise DataError(f"{where}: {recording.id} is listed in line {first} too.")
        if splits and (split is None) != (splits[0] is None):
            raise DataError(f"{where}: expected a split in every line, or in none.")
        recordings.append(recording)
        splits.append(split)
    if not recordings:
        raise DataError(f"{manifest} is empty; expected lines such as {EXAMPLE}.")
    if splits[0] is None:
        parts = split_by_speaker(recordings, seed=seed, name=str(manifest))
    else:
        parts = _by_split(recordings, splits, manifest)
    train, val, test = (
        recorded(part, name=f"{manifest.stem}-{split}")
        for part, split in zip(parts, SPLITS, strict=True)
    )
    has_words = any(" " in recording.text.strip() for recording in recordings)
    return Corpus(manifest.stem, train, val, test, "characters", has_words)


def _read_lines(manifest: Path) -> list[str]:
    try:
        return manifest.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"the manifest {manifest} cannot be read: {reason}; expected a UTF-8 file "
            f"of lines such as {EXAMPLE}."
        ) from error


def _parse(line: str, folder: Path, where: str) -> tuple[Recording, str | None]:
    """Returns what a line says: the recording, and its split if it has one."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where} is not JSON ({error}); expected a line such as {EXAMPLE}."
        ) from error
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object such as {EXAMPLE}, got {line}.")
    audio = _string(entry, "audio", where)
    if not audio:
        raise DataError(f"{where}: audio is empty; expected the path of a recording.")
    text = _string(entry, "text", where)
    speaker = _string(entry, "speaker", where) if "speaker" in entry else ""
    split = _string(entry, "split", where) if "split" in entry else None
    if split not in (None, *SPLITS):
        raise DataError(f"{where}: split {split!r} is none of {', '.join(SPLITS)}.")
    path = os.path.normpath(folder / audio)
    recording = Recording(audio, text, speaker, path, name=f"{where}: {path}")
    return recording, split


def _string(entry: dict[str, Any], key: str, where: str) -> str:
    if key not in entry:
        raise DataError(
            f"{where} has no {key!r}, only {', '.join(map(repr, entry)) or 'nothing'}; "
            f"expected a line such as {EXAMPLE}."
        )
    value = entry[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {value!r}; expected a string.")
    return value


def _by_split(
    recordings: list[Recording], splits: list[str | None], manifest: Path
) -> list[list[Recording]]:
    pairs = list(zip(recordings, splits, strict=True))
    parts = [
        [recording for recording, split in pairs if split == name] for name in SPLITS
    ]
    for name, part in zip(SPLITS, parts, strict=True):
        if not part:
            raise DataError(
                f"{manifest} has no line of the split {name!r}; expected train, val "
                "and test, or lines without a split, which are divided by speaker."
            )
    return parts
