"""Reads recordings: WAV and FLAC at any rate and channel count, to 16 kHz mono.

libsndfile (through soundfile) decodes, soxr resamples. libsndfile reads a truncated WAV
without a word, as a shorter one, so its header is compared with its size here.
"""

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from experiments.data.extra import import_extra
from experiments.data.speech.corpus import SAMPLE_RATE_HZ
from experiments.harness.errors import AudioError

Source = str | os.PathLike[str] | bytes | BinaryIO

RATES_HZ = (4_000, 768_000)
MAX_HEADER_S = 24 * 3600
# Floats are clipped at 1; much beyond it they are on another scale.
MAX_PEAK = 4.0
# What programs write that do not know the length yet, as on a pipe.
_UNKNOWN_LENGTH = 0x7FFF_F000


def read_audio(source: Source, *, name: str | None = None) -> np.ndarray:
    """Reads a recording, mixes its channels down to one, and resamples it.

    Args:
      source: a path, the bytes of a file, or an open binary file, which is read from
        its beginning.
      name: what errors call it; by default its path.

    Returns:
      (N,) float32 in [-1, 1] at 16 kHz.

    Raises:
      AudioError: if it cannot be read, is truncated or empty, or holds samples that are
        not finite or far outside [-1, 1]; names the recording and the reason.
      DataError: if soundfile or soxr is not installed.
    """
    name = name or _name(source)
    with _open(source, name) as file:
        samples = file.read(dtype="float32", always_2d=True)
        expected, rate_hz = file.frames, file.samplerate
    if len(samples) < expected:
        raise AudioError(
            f"{name} is truncated: its header promises {expected} samples, "
            f"{len(samples)} could be read; replace it."
        )
    _check_values(samples, name)
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if rate_hz != SAMPLE_RATE_HZ:
        mono = import_extra("soxr", extra="speech").resample(
            mono, rate_hz, SAMPLE_RATE_HZ
        )
    if not len(mono):
        raise AudioError(f"{name} holds no audio: {expected} samples at {rate_hz} Hz.")
    return np.clip(mono, -1.0, 1.0)


def audio_duration_s(source: Source, *, name: str | None = None) -> float:
    """Returns the seconds of audio of a recording, from its header alone.

    A FLAC that is truncated behind its header shows only when it is read.

    Raises:
      AudioError: if the header cannot be read, the file is empty, or a WAV is shorter
        than its header says; names the recording and the reason.
    """
    with _open(source, name or _name(source)) as file:
        return file.frames / file.samplerate


@contextlib.contextmanager
def _open(source: Source, name: str) -> Iterator[Any]:
    """Gives an open SoundFile whose header makes sense; translates every error."""
    soundfile = import_extra("soundfile", extra="speech")
    expected = (OSError, ValueError, TypeError, MemoryError, soundfile.SoundFileError)
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(source, str | os.PathLike):
                stream = stack.enter_context(open(source, "rb", buffering=0))
                handle = stream.fileno()  # twice as fast as calling back to Python
            else:
                stream = io.BytesIO(source) if isinstance(source, bytes) else source
                handle = stream
            _check_length(stream, name)
            file = soundfile.SoundFile(handle, closefd=False)
            stack.enter_context(file)
            _check_header(file.frames, file.samplerate, name)
            yield file
    except expected as error:
        reason = getattr(error, "error_string", None) or getattr(
            error, "strerror", None
        )
        raise AudioError(
            f"{name} cannot be read: {str(reason or error).rstrip('.')}; expected a "
            "WAV or FLAC file."
        ) from error


def _check_length(stream: Any, name: str) -> None:
    size = stream.seek(0, os.SEEK_END)
    if not size:
        raise AudioError(f"{name} is empty: 0 bytes; expected a WAV or FLAC file.")
    stream.seek(0)
    end = _wav_end(stream)
    stream.seek(0)
    if end > size:
        raise AudioError(
            f"{name} is truncated: its header promises {end} bytes, it has {size}; "
            "replace it."
        )


def _wav_end(stream: Any) -> int:
    """Returns where the samples of a WAV end by its header; 0 for other files."""
    head = stream.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return 0
    while len(chunk := stream.read(8)) == 8:
        kind, length = struct.unpack("<4sI", chunk)
        if kind == b"data":
            return 0 if length >= _UNKNOWN_LENGTH else stream.tell() + length
        stream.seek(length + length % 2, os.SEEK_CUR)
    return 0


def _check_header(frames: int, rate_hz: int, name: str) -> None:
    if frames <= 0:
        raise AudioError(f"{name} holds no audio: its header promises 0 samples.")
    low, high = RATES_HZ
    if not low <= rate_hz <= high:
        raise AudioError(
            f"{name} has a sample rate of {rate_hz} Hz; expected {low} to {high} Hz."
        )
    if frames > MAX_HEADER_S * rate_hz:
        raise AudioError(
            f"the header of {name} does not say how long it is, or says more than "
            f"{MAX_HEADER_S // 3600} hours; write it anew, or cut it into utterances."
        )


def _check_values(samples: np.ndarray, name: str) -> None:
    peak = float(np.abs(samples).max())
    if not np.isfinite(peak):
        num_bad = int((~np.isfinite(samples)).sum())
        raise AudioError(
            f"{name} is not finite: {num_bad} of {samples.size} samples are Inf or NaN."
        )
    if peak > MAX_PEAK:
        raise AudioError(
            f"{name} holds samples up to {peak:g}; expected floats in [-1, 1]: divide "
            "them by their full scale."
        )


def _name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes):
        return "the audio"
    return str(getattr(source, "name", "the audio"))
