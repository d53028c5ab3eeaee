"""Log-mel features, their normalisation, and SpecAugment.

They are computed of one utterance before any padding, so that an utterance has the same
numbers whichever batch it is in.
"""

import functools

import numpy as np
import numpy.typing as npt
import scipy.fft
import scipy.sparse

from experiments.data.speech.corpus import SAMPLE_RATE_HZ

WINDOW_SAMPLES = 400  # 25 ms
STEP_SAMPLES = 160  # 10 ms
FFT_SIZE = 512
MIN_HZ, MAX_HZ = 20.0, 8000.0
PRE_EMPHASIS = 0.97

MIN_POWER = 1e-7
"""Power below which a mel band counts as silent: about what rounding a recording to 16
bits leaves in a band, so that digital silence is no deeper than a quiet room."""

MIN_DEVIATION = 1e-3
"""Standard deviation below which a feature counts as constant."""


def num_feature_frames(num_samples: int) -> int:
    """Returns how many frames `log_mel` makes of that many samples at 16 kHz.

    >>> num_feature_frames(16_000), num_feature_frames(400), num_feature_frames(399)
    (98, 1, 0)
    """
    return max(0, 1 + (num_samples - WINDOW_SAMPLES) // STEP_SAMPLES)


def log_mel(
    samples: np.ndarray, *, num_mels: int = 40, pre_emphasis: float = PRE_EMPHASIS
) -> np.ndarray:
    """Returns the logarithm of the power in mel bands, frame by frame.

    Frames of 25 ms every 10 ms, all inside the samples; their mean removed,
    pre-emphasis within the frame, a Hann window, 512 points of FFT, and triangular
    filters from 20 Hz to 8 kHz, equally spaced on the mel scale
    1127 log(1 + f / 700): Kaldi's definition but for the window and for the floor under
    the power. Everything in float32.

    Args:
      samples: float32 (N,) in [-1, 1], 16 kHz, mono.
      num_mels: number of bands F.
      pre_emphasis: how much of the preceding sample is subtracted; 0 for none.

    Returns:
      float32 (T, F), T = `num_feature_frames(N)`; T is 0 if there are less than 25 ms.
    """
    if num_feature_frames(len(samples)) == 0:
        return np.zeros((0, num_mels), np.float32)
    samples = np.asarray(samples, np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW_SAMPLES)
    frames = windows[::STEP_SAMPLES]
    frames = frames - frames.mean(axis=1, keepdims=True)
    if pre_emphasis:
        emphasised = frames.copy()
        emphasised[:, 1:] -= np.float32(pre_emphasis) * frames[:, :-1]
        emphasised[:, 0] *= np.float32(1 - pre_emphasis)
        frames = emphasised
    frames *= _window()
    spectrum: npt.NDArray[np.complex64] = np.asarray(scipy.fft.rfft(frames, FFT_SIZE))
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    mels = (_sparse_filters(num_mels) @ power.T).T
    return np.log(np.maximum(mels, np.float32(MIN_POWER), order="C"))


def cmvn(features: np.ndarray) -> np.ndarray:
    """Normalises each feature of an utterance to mean 0 and variance 1 over time.

    A feature that is constant, up to rounding, becomes 0.

    Args:
      features: float32 (T, F).

    Returns:
      float32 (T, F).
    """
    if len(features) == 0:
        return features
    centered = features - features.mean(axis=0)
    centered -= centered.mean(axis=0)  # of large means float32 leaves a rest
    deviation = np.sqrt(np.mean(np.square(centered), axis=0))
    return centered / np.maximum(deviation, np.float32(MIN_DEVIATION))


def spec_augment(
    features: np.ndarray,
    rng: np.random.Generator,
    *,
    num_time_masks: int = 2,
    max_time_frames: int = 20,
    max_time_fraction: float = 0.2,
    num_mel_masks: int = 2,
    max_mels: int = 8,
) -> np.ndarray:
    """Masks random blocks of time and of frequency with 0, the mean after `cmvn`.

    The masks of SpecAugment (https://arxiv.org/abs/1904.08779), without its warping of
    time: each has a uniform width, from 0 to the most it may have, at a uniform place.

    Args:
      features: float32 (T, F), normalised; stays as it is.
      rng: source of the masks.
      num_time_masks: how many blocks of frames.
      max_time_frames: the widest block of frames.
      max_time_fraction: the widest block of frames, as a fraction of T.
      num_mel_masks: how many blocks of mel bands.
      max_mels: the widest block of bands; at most F.

    Returns:
      float32 (T, F).
    """
    masked = features.copy()
    num_frames, num_mels = features.shape
    widest = min(max_time_frames, int(max_time_fraction * num_frames))
    for _ in range(num_time_masks):
        masked[_block(rng, widest, num_frames)] = 0
    for _ in range(num_mel_masks):
        masked[:, _block(rng, min(max_mels, num_mels), num_mels)] = 0
    return masked


@functools.cache
def mel_filters(num_mels: int) -> np.ndarray:
    """Returns triangular filters, float32 (257, F): weights of the FFT's bins.

    Each rises from the centre of the band below to its own and falls to that of the
    band above, linearly in mel.

    Raises:
      ValueError: if a band is so narrow that no bin falls into it.
    """
    hz = np.arange(FFT_SIZE // 2 + 1) * SAMPLE_RATE_HZ / FFT_SIZE
    edges = np.linspace(_mel(MIN_HZ), _mel(MAX_HZ), num_mels + 2)
    position = (_mel(hz)[:, None] - edges[None, :-2]) / (edges[1] - edges[0])
    filters = np.maximum(0, 1 - np.abs(position - 1))
    if not filters.any(axis=0).all():
        raise ValueError(f"{num_mels} mel bands are too many; expected 80 or fewer.")
    filters = filters.astype(np.float32)
    filters.flags.writeable = False
    return filters


@functools.cache
def _sparse_filters(num_mels: int) -> scipy.sparse.csr_array:
    """Returns (F, 257): of so small a matrix, BLAS's threads take longer to wake."""
    return scipy.sparse.csr_array(mel_filters(num_mels).T)


@functools.cache
def _window() -> np.ndarray:
    phase = 2 * np.pi * np.arange(WINDOW_SAMPLES) / (WINDOW_SAMPLES - 1)
    return (0.5 - 0.5 * np.cos(phase)).astype(np.float32)


def _mel(hz):
    return 1127 * np.log1p(np.asarray(hz) / 700)


def _block(rng: np.random.Generator, widest: int, length: int) -> slice:
    width = int(rng.integers(widest + 1))
    start = int(rng.integers(length - width + 1))
    return slice(start, start + width)
