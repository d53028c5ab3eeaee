"""Recordings of any rate and channel count become 16 kHz mono, or an error."""

import io
import re
import sys

import numpy as np
import pytest
import soundfile

from experiments.data.speech import audio
from experiments.data.speech.audio import audio_duration_s, read_audio
from experiments.harness.errors import AudioError, DataError


def sine(num_samples: int, frequency_hz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(num_samples) / 16_000)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
@pytest.mark.parametrize("num_channels", [1, 2, 3])
@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 44_100, 48_000])
def test_any_rate_and_channel_count_gives_the_same_tone(
    suffix, num_channels, rate_hz, record, tmp_path
):
    path = tmp_path / f"a{suffix}"
    record(path, 0.4, rate_hz=rate_hz, num_channels=num_channels)
    samples = read_audio(path)
    assert samples.dtype == np.float32
    assert samples.shape == (6_400,)
    inner = slice(200, -200)  # the filter of the resampler rings at the ends
    np.testing.assert_allclose(samples[inner], sine(6_400)[inner], atol=2e-3)
    assert audio_duration_s(path) == 0.4


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_any_sample_format_gives_the_same_tone(subtype, record, tmp_path):
    samples = read_audio(record(tmp_path / "a.wav", subtype=subtype))
    np.testing.assert_allclose(samples, sine(8_000), atol=1e-2)


def test_16_bits_are_kept_bitwise(tmp_path):
    integers = np.random.default_rng(0).integers(-(2**15), 2**15, 5_000, np.int16)
    soundfile.write(tmp_path / "a.wav", integers, 16_000)
    assert np.array_equal(read_audio(tmp_path / "a.wav"), integers / np.float32(2**15))


def test_channels_are_averaged(tmp_path):
    left, right = sine(4_000), sine(4_000, 1_000)
    soundfile.write(
        tmp_path / "a.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT"
    )
    expected = (left + right) / 2
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), expected, atol=1e-6)


def test_a_tone_above_8_khz_is_filtered_out(tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 10_000 * np.arange(24_000) / 48_000)
    soundfile.write(tmp_path / "a.wav", tone, 48_000)
    assert np.abs(read_audio(tmp_path / "a.wav")[200:-200]).max() < 1e-3


def test_bytes_and_open_files_are_read_as_paths_are(record, tmp_path):
    path = record(tmp_path / "a.flac", rate_hz=22_050, num_channels=2)
    expected = read_audio(path)
    assert np.array_equal(read_audio(str(path)), expected)
    assert np.array_equal(read_audio(path.read_bytes()), expected)
    with path.open("rb") as file:
        file.seek(100)
        assert audio_duration_s(file) == 0.5
        assert np.array_equal(read_audio(file), expected)
        assert not file.closed
    assert np.array_equal(read_audio(io.BytesIO(path.read_bytes())), expected)


def test_loud_floats_are_clipped(tmp_path):
    soundfile.write(tmp_path / "a.wav", 3 * sine(1_000), 16_000, subtype="FLOAT")
    samples = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(samples, np.clip(3 * sine(1_000), -1, 1), atol=1e-6)


def test_floats_on_the_scale_of_integers_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", 32_768 * sine(1_000), 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav holds samples up to 1638\d.*divide"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate_hz", [16_000, 48_000])
def test_samples_that_are_not_finite_are_refused(bad, rate_hz, tmp_path):
    samples = sine(1_000)
    samples[[10, 500]] = bad
    soundfile.write(tmp_path / "a.wav", samples, rate_hz, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"a\.wav is not finite: 2 of 1000 samples"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("keep", [0.3, 0.99])
def test_a_truncated_wav_is_found_by_its_header(keep, record, tmp_path):
    path = record(tmp_path / "a.wav")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    for read in (read_audio, audio_duration_s):
        with pytest.raises(
            AudioError, match=r"a\.wav is truncated: its header promises 16044 bytes"
        ):
            read(path)


@pytest.mark.parametrize("keep", [0.3, 0.99])
def test_a_truncated_flac_is_found_when_read(keep, tmp_path):
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 20_000)
    soundfile.write(path, noise, 16_000)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(AudioError, match=r"a\.flac (is truncated|cannot be read)"):
        read_audio(path)


@pytest.mark.parametrize("unknown", [0xFFFF_FFFF, 0x7FFF_F000])
def test_a_wav_written_to_a_pipe_is_read(unknown, record, tmp_path):
    path = record(tmp_path / "a.wav")
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = unknown.to_bytes(4, "little")
    path.write_bytes(content)
    np.testing.assert_allclose(read_audio(path), sine(8_000), atol=1e-4)


def test_chunks_before_the_samples_are_passed_over(record, tmp_path):
    path = record(tmp_path / "a.wav")
    content = path.read_bytes()
    place = content.index(b"data")
    extra = b"LIST" + (5).to_bytes(4, "little") + b"INFOx\0"
    path.write_bytes(content[:place] + extra + content[place:])
    assert len(read_audio(path)) == 8_000
    path.write_bytes((content[:place] + extra + content[place:])[:-10])
    with pytest.raises(AudioError, match="is truncated"):
        read_audio(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty: 0 bytes"),
        (b"no audio at all" * 100, "cannot be read: .*expected a WAV or FLAC"),
        (b"RIFF\0\0\0\0WAVE", "cannot be read: .*expected a WAV or FLAC"),
        (b"fLaC" + bytes(10), "cannot be read: .*expected a WAV or FLAC"),
    ],
    ids=["empty", "text", "RIFF", "fLaC"],
)
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".raw", ""])
def test_what_is_no_audio_is_explained(content, reason, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    for read in (read_audio, audio_duration_s):
        with pytest.raises(AudioError, match=rf"{re.escape(str(path))} {reason}"):
            read(path)
    with pytest.raises(AudioError, match=f"line 3 {reason}"):
        read_audio(content, name="line 3")


def test_a_path_that_cannot_be_opened_is_explained(tmp_path):
    with pytest.raises(AudioError, match=r"none\.wav cannot be read: No such file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(AudioError, match="cannot be read: Is a directory"):
        audio_duration_s(tmp_path)
    with pytest.raises(AudioError, match="cannot be read: embedded null"):
        read_audio("a\0.wav")


def test_a_header_without_samples_is_explained(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16_000)
    for read in (read_audio, audio_duration_s):
        with pytest.raises(AudioError, match=r"a\.wav holds no audio"):
            read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.wav", np.zeros(1), 48_000)
    with pytest.raises(AudioError, match="holds no audio: 1 samples at 48000 Hz"):
        read_audio(tmp_path / "b.wav")


def test_an_absurd_rate_or_length_is_refused(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", sine(100), 10)
    with pytest.raises(AudioError, match=r"a sample rate of 10 Hz; expected 4000 to"):
        read_audio(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.flac", sine(40_000), 16_000)
    monkeypatch.setattr(audio, "MAX_HEADER_S", 2)
    with pytest.raises(AudioError, match="does not say how long it is"):
        audio_duration_s(tmp_path / "b.flac")


@pytest.mark.parametrize("missing", ["soundfile", "soxr"])
def test_a_missing_library_names_the_command(missing, monkeypatch, record, tmp_path):
    path = record(tmp_path / "a.wav", rate_hz=8_000)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DataError, match=rf'{missing}.*pip install -e "\.\[speech\]"'):
        read_audio(path)
