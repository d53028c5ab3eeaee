"""Recordings in the cache: one memory-mapped file of samples, and an index to it."""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import cache
from experiments.data.speech.corpus import SAMPLE_RATE_HZ, Utterance
from experiments.harness.errors import AudioError, DataError
from experiments.harness.files import atomic_write

INT16_SCALE = 32768.0


class Recording(NamedTuple):
    """An utterance with its audio.

    Attributes:
      split: train, val or test.
      text: what is said.
      speaker: who says it.
      samples: int16 (N,), 16 kHz, mono.
    """

    split: str
    text: str
    speaker: str
    samples: np.ndarray


class StoredUtterances:
    """A split of cached recordings; implements `Utterances`.

    It can be pickled and sent to worker processes: the file is opened where samples are
    asked for.
    """

    def __init__(self, path: Path, split: str, index: dict[str, np.ndarray]):
        """Takes the rows of the index that belong to the split.

        Args:
          path: the file of samples.
          split: train, val or test.
          index: see `write`.
        """
        rows = np.flatnonzero(index["split"] == split)
        self._path = path
        self._split = split
        self._texts = index["text"][rows]
        self._speakers = index["speaker"][rows]
        self._starts = index["start"][rows]
        self._ends = index["start"][rows + 1]
        self._samples: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Utterance:
        """Returns what is known of an utterance; negative indices count from the end.

        Raises:
          IndexError: if there is none with that index.
        """
        index = range(len(self))[index]
        return Utterance(
            id=f"{self._split}-{index:06d}",
            text=str(self._texts[index]),
            speaker=str(self._speakers[index]),
            duration_s=int(self._ends[index] - self._starts[index]) / SAMPLE_RATE_HZ,
        )

    def samples(self, index: int) -> np.ndarray:
        """Returns the audio, float32 (N,) in [-1, 1], at 16 kHz.

        Raises:
          AudioError: if the file has gone since the corpus was loaded.
        """
        part = slice(int(self._starts[index]), int(self._ends[index]))
        return np.divide(self._open()[part], INT16_SCALE, dtype=np.float32)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_samples": None}

    def _open(self) -> np.ndarray:
        samples = self._samples
        if samples is None:
            try:
                samples = self._samples = np.load(self._path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise AudioError(
                    f"{self._path} cannot be read ({error}); run again, and the corpus "
                    "is made anew."
                ) from error
        return samples


def write(path: Path, recordings: Iterable[Recording], num_bytes: int) -> None:
    """Writes samples to `path` and their index beside it, the index last.

    The index is an npz: `split`, `text` and `speaker` of each recording, `start` of
    each and the end of the last, in samples, and the `sha256` of the file of samples.
    The caller holds the lock of the directory.

    Args:
      path: an .npy file.
      recordings: in the order of the splits' indices; read one by one.
      num_bytes: about how large the file becomes, for the message when the disk is
        full.

    Raises:
      DataError: if the files cannot be written; no part of them stays behind.
    """
    with cache.translate_os_errors(path, num_bytes):
        cache.remove_temporaries(path)
        with atomic_write(path) as temporary:
            index = _write_samples(temporary, recordings)
            digest = _sha256(temporary)
    cache.write_npz(_index_path(path), {**index, "sha256": np.array(digest)})


def read(path: Path) -> dict[str, StoredUtterances] | None:
    """Returns the splits that were written, or None if nothing was.

    Raises:
      DataError: if a file is damaged or missing.
    """
    if not os.path.lexists(_index_path(path)):
        return None
    index = cache.read_npz(_index_path(path))
    try:
        if _sha256(path) != index["sha256"]:
            raise DataError(f"{path.name} is not what was written")
        splits = np.unique(index["split"])
        return {str(s): StoredUtterances(path, str(s), index) for s in splits}
    except (OSError, KeyError, IndexError) as error:
        raise DataError(f"{type(error).__name__}: {error}") from error


def _write_samples(
    path: Path, recordings: Iterable[Recording]
) -> dict[str, np.ndarray]:
    rows: list[tuple[str, str, str]] = []
    lengths: list[int] = []

    def blocks() -> Iterator[np.ndarray]:
        for recording in recordings:
            rows.append((recording.split, recording.text, recording.speaker))
            lengths.append(len(recording.samples))
            yield recording.samples

    _write_npy(path, blocks())
    split, text, speaker = (np.array(c) for c in zip(*rows, strict=True))
    start = np.array([0, *itertools.accumulate(lengths)], np.int64)
    return {"split": split, "text": text, "speaker": speaker, "start": start}


def _write_npy(path: Path, blocks: Iterable[np.ndarray]) -> None:
    """Writes int16 blocks as one array, whose length is known at the end only."""
    with path.open("wb") as file:
        _write_header(file, 0)
        begin = file.tell()
        num_samples = 0
        for block in blocks:
            file.write(block.astype("<i2", copy=False).tobytes())
            num_samples += len(block)
        file.seek(0)
        _write_header(file, num_samples)
        if file.tell() != begin:
            raise DataError(f"NumPy's header has changed its length in {path}")
        file.flush()
        os.fsync(file.fileno())


def _write_header(file, length: int) -> None:
    header = {"descr": "<i2", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _index_path(path: Path) -> Path:
    return path.with_suffix(".npz")
