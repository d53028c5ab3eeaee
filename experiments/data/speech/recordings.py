"""Utterances whose audio lies in files, or in parts of files such as tar archives."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data.speech.audio import audio_duration_s, read_audio
from experiments.data.speech.corpus import Utterance
from experiments.harness.errors import AudioError


class Recording(NamedTuple):
    """An utterance and where its audio lies.

    Attributes:
      id: its name in the corpus, which no other recording has.
      text: what is said.
      speaker: who says it; "" where that is not known.
      path: the file.
      offset: the byte of the file where the audio file begins.
      num_bytes: how long it is; None for all of the file.
      name: what errors call it; "" for its path.
    """

    id: str
    text: str
    speaker: str
    path: str
    offset: int = 0
    num_bytes: int | None = None
    name: str = ""

    def samples(self) -> np.ndarray:
        """Returns the audio, (N,) float32 in [-1, 1] at 16 kHz; see `read_audio`."""
        return read_audio(self._content(), name=self._label())

    def duration_s(self) -> float:
        """Returns the seconds of audio by the header; see `audio_duration_s`."""
        return audio_duration_s(self._content(), name=self._label())

    def _label(self) -> str:
        return self.name or self.path

    def _content(self) -> str | bytes:
        if self.num_bytes is None:
            return self.path
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.num_bytes)
        except OSError as error:
            raise AudioError(
                f"{self._label()} cannot be read: {error.strerror or error} "
                f"({self.path})."
            ) from error


class RecordedUtterances:
    """A split of a corpus of recordings.

    Args:
      recordings: in the order of the split.
      durations_s: (len(recordings),) seconds of audio; NaN where the header cannot be
        read, which `select` reports.
    """

    def __init__(self, recordings: Sequence[Recording], durations_s: np.ndarray):
        if len(recordings) != len(durations_s):
            raise ValueError(
                f"expected a duration for each of {len(recordings)} recordings, got "
                f"{len(durations_s)}"
            )
        self._recordings = recordings
        self._durations_s = durations_s

    def __len__(self) -> int:
        return len(self._recordings)

    def __getitem__(self, index: int) -> Utterance:
        recording = self._recordings[index]
        return Utterance(
            recording.id,
            recording.text,
            recording.speaker,
            float(self._durations_s[index]),
        )

    def samples(self, index: int) -> np.ndarray:
        """Returns the audio of an utterance, (N,) float32 in [-1, 1] at 16 kHz.

        Raises:
          AudioError: if the audio cannot be read; names the file and the reason.
        """
        return self._recordings[index].samples()
