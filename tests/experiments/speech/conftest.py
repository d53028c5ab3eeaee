"""A cache of the test's own, and recordings of tones."""

from pathlib import Path

import numpy as np
import pytest
import soundfile


@pytest.fixture(autouse=True)
def speech_cache(monkeypatch, tmp_path) -> Path:
    """An empty cache; returns its folder of speech."""
    monkeypatch.setenv("MPJAX_DATA_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "speech"


@pytest.fixture
def record():
    """Writes a tone of 440 Hz to a WAV or FLAC file, whose folder it makes."""

    def write(
        path: Path,
        duration_s: float = 0.5,
        *,
        rate_hz: int = 16_000,
        num_channels: int = 1,
        subtype: str | None = None,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
        samples = np.tile(0.5 * np.sin(2 * np.pi * 440 * time_s), (num_channels, 1))
        soundfile.write(path, samples.T, rate_hz, subtype=subtype)
        return path

    return write
