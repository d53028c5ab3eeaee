"""From planned utterances to recordings: espeak-ng's voice, resampled, in noise."""

import collections
import concurrent.futures
import functools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.signal
from tqdm.auto import tqdm

from experiments.data.extra import import_extra
from experiments.data.speech import espeak
from experiments.data.speech.corpus import SAMPLE_RATE_HZ
from experiments.data.speech.phrases import Planned
from experiments.harness.errors import DataError

CHUNK_SIZE = 500
"""Utterances from one process of espeak-ng. It keeps state between them, so the audio
depends on this number, but not on how many processes run at a time."""

MIN_SILENCE_S, MAX_SILENCE_S = 0.02, 0.15
MIN_LEVEL_DB, MAX_LEVEL_DB = -32.0, -18.0
MAX_TILT = 0.95
MAX_PEAK = np.float32(0.99)


class Noise(NamedTuple):
    """Range of signal-to-noise ratios, in dB; each utterance has its own."""

    min_snr_db: float
    max_snr_db: float


def synthesise(
    planned: Sequence[Planned], noise: Noise, seed: int
) -> Iterator[np.ndarray]:
    """Says everything that is planned, in order, on all cores.

    Args:
      planned: what to say.
      noise: what to add.
      seed: of the noise.

    Yields:
      the samples of each utterance, int16 (N,), 16 kHz.

    Raises:
      DataError: if espeak-ng is not installed or fails.
    """
    num_processes = os.cpu_count() or 1
    make = functools.partial(_make_chunk, planned, noise, seed)
    starts = collections.deque(range(0, len(planned), CHUNK_SIZE))
    pool = concurrent.futures.ThreadPoolExecutor(num_processes)
    pending: collections.deque[concurrent.futures.Future[list[np.ndarray]]]
    pending = collections.deque()
    bar = tqdm(
        total=len(planned), desc="Mandarin by espeak-ng", unit="utt", disable=None
    )
    try:
        while starts or pending:
            while starts and len(pending) <= num_processes:  # few chunks in memory
                pending.append(pool.submit(make, starts.popleft()))
            chunk = pending.popleft().result()
            yield from chunk
            bar.update(len(chunk))
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)  # waits for what runs: two minutes at most


def add_noise(speech: np.ndarray, noise: Noise, rng: np.random.Generator) -> np.ndarray:
    """Puts speech at a random level between two silences, and adds noise to it all.

    The noise is Gaussian with a random tilt of its spectrum, from white to about
    -6 dB per octave. Signal and noise are compared by their root mean square, the
    silences not counted.

    Args:
      speech: float32 (N,), not all zero.
      noise: the range of signal-to-noise ratios.
      rng: source of everything random.

    Returns:
      float32 (M,), M >= N, of magnitude at most 0.99.
    """
    before, after = rng.uniform(MIN_SILENCE_S, MAX_SILENCE_S, 2) * SAMPLE_RATE_HZ
    level = np.float32(10 ** (rng.uniform(MIN_LEVEL_DB, MAX_LEVEL_DB) / 20))
    snr = np.float32(10 ** (rng.uniform(*noise) / 20))
    tilt = np.float32(rng.uniform(0, MAX_TILT))
    audio = np.zeros(int(before) + len(speech) + int(after), np.float32)
    audio[int(before) :][: len(speech)] = speech * (level / _rms(speech))
    hiss = rng.standard_normal(len(audio), np.float32)
    one = np.ones(1, np.float32)
    hiss = np.asarray(scipy.signal.lfilter(one, np.append(one, -tilt), hiss))
    audio += hiss * (level / snr / _rms(hiss))
    return audio * min(np.float32(1), MAX_PEAK / np.abs(audio).max())


def _make_chunk(
    planned: Sequence[Planned], noise: Noise, seed: int, start: int
) -> list[np.ndarray]:
    soxr = import_extra("soxr", extra="speech")
    lines = [item.line for item in planned[start : start + CHUNK_SIZE]]
    order = sorted(range(len(lines)), key=lambda i: lines[i])  # voices change slowly
    spoken, rate_hz = espeak.speak([lines[i] for i in order])
    said = dict(zip(order, spoken, strict=True))
    chunk = []
    for i, line in enumerate(lines):
        samples = said[i]
        if not samples.any():
            raise DataError(f"espeak-ng says nothing for {line}.")
        speech = soxr.resample(samples / np.float32(32768), rate_hz, SAMPLE_RATE_HZ)
        rng = np.random.default_rng([seed, start + i])
        audio = add_noise(speech, noise, rng)
        chunk.append(np.round(audio * 32767).astype(np.int16))
    return chunk


def _rms(samples: np.ndarray) -> np.float32:
    return np.sqrt(np.mean(np.square(samples)))
