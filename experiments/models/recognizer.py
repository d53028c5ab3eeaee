"""A trained network that hears one utterance at a time, and files of recordings.

T denotes frames of features, T' outputs of the network in time, V symbols of the
vocabulary, the blank included.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import mpjax
from experiments.data.speech.audio import read_audio
from experiments.data.speech.corpus import SAMPLE_RATE_HZ
from experiments.data.speech.features import (
    WINDOW_SAMPLES,
    cmvn,
    log_mel,
    num_feature_frames,
)
from experiments.data.speech.vocabulary import Vocabulary, collapse
from experiments.harness.errors import AudioError, WorkdirError
from experiments.harness.files import read_json, write_json
from experiments.models.recognition import Decoder, make_eval_step

VOCABULARY = "vocabulary.json"
_FRAME_MULTIPLE = 256  # lengths that the network is compiled for, in frames


@dataclasses.dataclass(frozen=True)
class Recognizer:
    """A network, its weights, and what its outputs stand for.

    Attributes:
      eval_step: as `recognition.make_eval_step` returns it.
      state: whose parameters and model state it uses.
      vocabulary: the symbols.
      num_mels: features of a frame.
      decode: from log probabilities to text; by default the most probable path.
    """

    eval_step: Any
    state: mpjax.TrainState
    vocabulary: Vocabulary
    num_mels: int
    decode: Decoder | None = None

    def log_probabilities(self, samples: np.ndarray) -> np.ndarray:
        """Returns (T', V) float32 of an utterance's samples, (N,) float32 at 16 kHz."""
        features = cmvn(log_mel(samples, num_mels=self.num_mels))
        num_frames = len(features)
        room = max(1, math.ceil(num_frames / _FRAME_MULTIPLE)) * _FRAME_MULTIPLE
        padded = np.pad(features, ((0, room - num_frames), (0, 0)))
        batch = {
            "features": padded[None],
            "num_frames": np.array([num_frames], np.int32),
            "labels": np.zeros((1, 1), np.int32),
            "num_labels": np.zeros(1, np.int32),
        }
        outputs = self.eval_step(self.state, batch)
        log_probabilities = np.asarray(outputs["log_probabilities"][0])
        return log_probabilities[: int(outputs["num_outputs"][0])]

    def text(self, log_probabilities: np.ndarray) -> str:
        """Returns the text of log probabilities (T', V)."""
        if self.decode is not None:
            return self.decode(log_probabilities, self.vocabulary)
        return self.vocabulary.decode(collapse(log_probabilities.argmax(axis=-1)))


def make_recognizer(
    model: nn.Module,
    variables: Mapping[str, Any],
    vocabulary: Vocabulary,
    policy: str,
    *,
    autocast: bool,
    num_mels: int,
    decode: Decoder | None = None,
) -> Recognizer:
    """Returns a recognizer of trained weights.

    Args:
      model: a Linen module; see `SpeechModel`.
      variables: its `params` and `model_state`.
      vocabulary: the symbols of its classes.
      policy: the precision policy to compute in.
      autocast: how the policy is applied; see `mpjax.make_eval_step`.
      num_mels: features of a frame.
      decode: from log probabilities to text; by default the most probable path.
    """
    state = mpjax.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.asarray, variables["params"]),
        opt_state=None,
        model_state=jax.tree.map(jnp.asarray, variables["model_state"]),
        ema_params=None,
        key=None,
    )
    eval_step = make_eval_step(model, policy, autocast=autocast)
    return Recognizer(eval_step, state, vocabulary, num_mels, decode)


def read_recordings(
    paths: Sequence[str | os.PathLike[str]], *, min_duration_s: float
) -> list[np.ndarray]:
    """Returns the samples of recordings, WAV or FLAC at any rate, float32 at 16 kHz.

    Args:
      paths: the files.
      min_duration_s: the shortest recording that is accepted; no less than a frame.

    Raises:
      AudioError: for the first that cannot be read or is too short; names it.
    """
    recordings = []
    min_duration_s = max(min_duration_s, WINDOW_SAMPLES / SAMPLE_RATE_HZ)
    for path in paths:
        samples = read_audio(Path(path).expanduser())
        duration_s = len(samples) / SAMPLE_RATE_HZ
        if duration_s < min_duration_s or not num_feature_frames(len(samples)):
            raise AudioError(
                f"{os.fspath(path)} is too short: {duration_s:.3f} s; expected "
                f"{min_duration_s:g} s or more."
            )
        recordings.append(samples)
    return recordings


def keep_vocabulary(workdir: Path, vocabulary: Vocabulary) -> None:
    """Writes the vocabulary of a run, or compares it with the one that is there.

    Raises:
      WorkdirError: if the run has another, as when its corpus has changed since.
      OSError: if it cannot be written.
    """
    file = workdir / VOCABULARY
    if not file.exists():
        write_json(file, vocabulary.to_json())
        return
    existing = read_vocabulary(workdir)
    if existing != vocabulary:
        there, here = set(existing.symbols), set(vocabulary.symbols)
        raise WorkdirError(
            f"{file} is not the vocabulary of the corpus: only there "
            f"{''.join(sorted(there - here))!r}, only in the corpus "
            f"{''.join(sorted(here - there))!r}. Restore the corpus, or use another "
            "--workdir."
        )


def read_vocabulary(workdir: Path) -> Vocabulary:
    """Returns the vocabulary of a run.

    Raises:
      WorkdirError: if it is missing or cannot be read.
      DataError: if it is damaged.
    """
    return Vocabulary.from_json(read_json(workdir / VOCABULARY))
