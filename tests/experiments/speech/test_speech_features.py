"""Log-mel features against a slow float64 oracle; normalisation; masks."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.speech import features


def noise(num_samples, seed=0, level=0.1):
    rng = np.random.default_rng(seed)
    return (level * rng.standard_normal(num_samples)).astype(np.float32)


def slow_log_mel(samples, num_mels, pre_emphasis):
    """Written from the definition, loop by loop, in float64, by a matrix of the DFT."""
    samples = samples.astype(np.float64)
    n, k = np.arange(400), np.arange(257)
    dft = np.exp(-2j * np.pi * np.outer(k, n) / 512)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 399)

    def to_mel(hz):
        return 1127 * np.log(1 + hz / 700)

    def to_hz(mel):
        return 700 * (np.exp(mel / 1127) - 1)

    step = (to_mel(8000) - to_mel(20)) / (num_mels + 1)
    rows = []
    for start in range(0, len(samples) - 399, 160):
        frame = samples[start : start + 400]
        frame = frame - frame.sum() / 400
        previous = np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(dft @ ((frame - pre_emphasis * previous) * window)) ** 2
        row = []
        for band in range(num_mels):
            low, center, high = (to_mel(20) + step * (band + i) for i in range(3))
            total = 0.0
            for i, hz in enumerate(k * 16000 / 512):
                if to_hz(low) < hz <= to_hz(center):
                    total += power[i] * (to_mel(hz) - low) / step
                elif to_hz(center) < hz < to_hz(high):
                    total += power[i] * (high - to_mel(hz)) / step
            row.append(np.log(max(total, 1e-7)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("num_mels", [40, 80])
@pytest.mark.parametrize("pre_emphasis", [0.97, 0.0])
def test_log_mel_is_what_the_definition_says(num_mels, pre_emphasis):
    samples = noise(2000) + np.float32(0.3)  # an offset, which is taken away
    got = features.log_mel(samples, num_mels=num_mels, pre_emphasis=pre_emphasis)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert got.shape == (11, num_mels)
    want = slow_log_mel(samples, num_mels, pre_emphasis)
    np.testing.assert_allclose(got, want, atol=2e-3)


def test_a_tone_is_in_its_band():
    seconds = np.arange(16000) / 16000
    for hz in (300, 1000, 4000):
        tone = np.sin(2 * np.pi * hz * seconds).astype(np.float32)
        loudest = features.log_mel(tone).mean(axis=0).argmax()
        band = features.mel_filters(40)[:, loudest]
        assert band[round(hz * 512 / 16000)] > 0.3


@given(st.integers(0, 5000))
def test_frames_are_counted(num_samples):
    frames = features.log_mel(noise(num_samples))
    assert len(frames) == features.num_feature_frames(num_samples)
    assert features.num_feature_frames(num_samples + 160) <= len(frames) + 1


def test_a_frame_depends_on_its_own_samples_only():
    """So padding after the features changes no number of an utterance."""
    samples = noise(8000)
    whole = features.log_mel(samples)
    assert np.array_equal(features.log_mel(samples[:4000]), whole[:23])
    assert np.array_equal(features.log_mel(samples[1600:]), whole[10:])
    padded = features.log_mel(np.concatenate([samples, np.zeros(4000, np.float32)]))
    assert np.array_equal(padded[: len(whole)], whole)


def test_silence_is_finite_and_at_the_floor():
    silent = features.log_mel(np.zeros(1600, np.float32))
    assert np.array_equal(silent, np.full_like(silent, np.log(np.float32(1e-7))))
    assert np.array_equal(features.cmvn(silent), np.zeros_like(silent))


def test_too_many_bands_are_refused():
    with pytest.raises(ValueError, match="200 mel bands are too many"):
        features.mel_filters(200)


def test_cmvn_has_mean_0_and_variance_1():
    rng = np.random.default_rng(1)
    raw = (rng.standard_normal((300, 40)) * 3 - 1000).astype(np.float32)
    normal = features.cmvn(raw)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.mean(axis=0, dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(normal.std(axis=0, dtype=np.float64), 1, atol=1e-5)
    want = (raw - raw.mean(0, np.float64)) / raw.std(0, np.float64)
    np.testing.assert_allclose(normal, want, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, -13.7, 1e4 / 3])
@pytest.mark.parametrize("num_frames", [1, 7, 1000])
def test_constant_features_become_0(value, num_frames):
    constant = np.full((num_frames, 3), value, np.float32)
    np.testing.assert_allclose(features.cmvn(constant), 0, atol=1e-6)


def test_nothing_stays_nothing():
    empty = features.log_mel(np.zeros(0, np.float32))
    assert empty.shape == features.cmvn(empty).shape == (0, 40)
    rng = np.random.default_rng(0)
    assert features.spec_augment(empty, rng).shape == (0, 40)


@given(st.integers(1, 200), st.integers(0, 10_000))
def test_masks_are_blocks_of_at_most_their_width(num_frames, seed):
    ones = np.ones((num_frames, 40), np.float32)
    masked = features.spec_augment(
        ones,
        np.random.default_rng(seed),
        num_time_masks=1,
        num_mel_masks=1,
        max_time_frames=10,
        max_mels=6,
    )
    assert (ones == 1).all()
    frames = np.flatnonzero((masked == 0).all(axis=1))
    mels = np.flatnonzero((masked == 0).all(axis=0))
    assert len(frames) <= min(10, 0.2 * num_frames)
    assert len(mels) <= 6
    assert np.array_equal(np.diff(frames), np.ones(max(0, len(frames) - 1)))
    assert np.array_equal(np.diff(mels), np.ones(max(0, len(mels) - 1)))
    kept = masked.copy()
    kept[frames] = 1
    kept[:, mels] = 1
    assert (kept == 1).all()


def test_masks_follow_the_generator_and_reach_everywhere():
    ones = np.ones((100, 40), np.float32)
    rng = np.random.default_rng(0)
    many = [features.spec_augment(ones, rng) for _ in range(400)]
    again = features.spec_augment(ones, np.random.default_rng(0))
    assert np.array_equal(many[0], again)
    share = 1 - np.mean(many, axis=0)
    assert share.min() > 0.05
    # Widths are 0 to 20 of 100 frames twice and 0 to 8 of 40 bands twice: means 10, 4.
    expected = 1 - (1 - 0.1) ** 4
    assert abs(share.mean() - expected) < 0.02


@pytest.mark.weekly
def test_log_mel_takes_less_than_a_millisecond():
    samples = noise(24_000)
    features.log_mel(samples)
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        features.log_mel(samples)
        times.append(time.perf_counter() - begin)
    assert min(times) < 1e-3
