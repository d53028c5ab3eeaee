"""The process of espeak-ng: what it says, again and again, and how it fails."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.data import extra
from experiments.data.speech import espeak, voices
from experiments.harness.errors import DataError

HELLO = espeak.Line("m3", "ni3 hao3", 175, 50)
# These voices differ between processes unless espeak-ng's random numbers are seeded.
BREATHY = [HELLO._replace(voice=voice) for voice in ("f2", "f3", "f5", "m3")]


def test_the_same_lines_give_the_same_samples():
    first, rate_hz = espeak.speak(BREATHY)
    second, _ = espeak.speak(BREATHY)
    assert rate_hz == 22_050
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(samples.dtype == np.int16 for samples in first)
    assert all(0.3 < len(samples) / rate_hz < 0.8 for samples in first)
    assert all(np.abs(samples).max() > 3000 for samples in first)


def test_rate_pitch_and_voice_are_heard():
    slow = HELLO._replace(rate_wpm=90)
    high = HELLO._replace(pitch=90)
    other = HELLO._replace(voice="linda")
    (hello, slow, high, other), _ = espeak.speak([HELLO, slow, high, other])
    assert len(slow) > 1.7 * len(hello)
    assert not np.array_equal(high, hello[: len(high)])
    assert np.median(_f0_hz(high)) > 1.2 * np.median(_f0_hz(hello))
    assert np.median(_f0_hz(other)) > 1.5 * np.median(_f0_hz(hello))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (HELLO._replace(voice="nobody"), "no voice 'nobody'"),
        (HELLO._replace(rate_wpm="fast"), "exit code 1"),
    ],
)
def test_what_espeak_refuses_is_an_error(line, match):
    with pytest.raises(DataError, match=match):
        espeak.speak([HELLO, line])


def test_a_missing_extra_names_the_command(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(DataError, match=r'pip install -e "\.\[speech\]"'):
        espeak.version()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(DataError, match=r'pip install -e "\.\[speech\]"'):
        espeak.speak([HELLO])
    with pytest.raises(DataError, match="no_such_library cannot be imported"):
        extra.import_extra("no_such_library", extra="speech")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("import os; os.abort()", "exit code -6: no message"),
        ("print('{')", "cannot be read"),
        ("print('[]')", "cannot be read"),
        (
            'print(\'{"sample_rate_hz": 22050, "num_samples": [5]}\')',
            "1 of 1 lines",
        ),
    ],
)
def test_a_worker_that_dies_or_babbles_is_an_error(monkeypatch, tmp_path, body, match):
    (tmp_path / "worker.py").write_text(body)
    monkeypatch.setattr(espeak, "_WORKER", tmp_path / "worker.py")
    with pytest.raises(DataError, match=match):
        espeak.speak([HELLO])


def test_a_worker_that_hangs_is_ended(monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    body = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
    (tmp_path / "worker.py").write_text(body + "time.sleep(60)")
    monkeypatch.setattr(espeak, "_WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(espeak, "TIMEOUT_S", 1.0)
    begin = time.monotonic()
    with pytest.raises(DataError, match="did not say 1 lines in 1 s"):
        espeak.speak([HELLO])
    assert time.monotonic() - begin < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_espeak_is_in_no_process_but_its_own():
    script = (
        "from experiments.data.speech import espeak, mandarin, synthesis\n"
        "espeak.speak([espeak.Line('m3', 'ni3', 175, 50)])\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('espeak-ng' in maps)"
    )
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc here")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "False\n", done.stderr


def test_long_paths_and_other_directories_work(monkeypatch, tmp_path):
    import espeakng_loader

    deep = tmp_path / ("d" * 100) / ("e" * 100)
    data = deep / "espeak-ng-data"
    shutil.copytree(espeakng_loader.get_data_path(), data)
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(data))
    monkeypatch.chdir(deep)
    (deep / "json.py").write_text("raise ImportError('mine')")
    assert len(espeak.speak([HELLO])[0][0]) > 5000


def test_the_request_is_plain_json(monkeypatch):
    seen = {}

    def run(command, **kwargs):
        seen.update(json.loads(kwargs["input"]))
        raise subprocess.TimeoutExpired(command, kwargs["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError):
        espeak.speak([HELLO])
    assert seen["lines"] == [["m3", "ni3 hao3", 175, 50]]
    assert seen["seed"] == 1


def test_the_splits_share_no_voice():
    train, val, test = voices.TRAIN_VOICES, voices.VAL_VOICES, voices.TEST_VOICES
    together = [*train, *val, *test]
    assert len(set(together)) == len(together) == 48 + 6 + 8


@pytest.mark.slow
def test_held_out_voices_are_unlike_those_in_training():
    names = [*voices.TRAIN_VOICES, *voices.VAL_VOICES, *voices.TEST_VOICES]
    text = "ni3 hao3 zhuang1 guo2 xie4 shan1"
    audio, _ = espeak.speak([espeak.Line(name, text, 175, 50) for name in names])
    timbres = np.array([_timbre(samples) for samples in audio])
    known = len(voices.TRAIN_VOICES)
    distances = np.linalg.norm(timbres[known:, None] - timbres[None, :known], axis=-1)
    nearest = distances.min(axis=1) / np.sqrt(timbres.shape[1])
    assert nearest.min() > voices.MIN_DISTANCE, dict(
        zip(names[known:], nearest.round(2), strict=True)
    )


def _timbre(samples):
    """Returns the mean log-spectrum in nepers, less its mean, which is loudness."""
    frames = np.lib.stride_tricks.sliding_window_view(samples / 32768, 512)[::256]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(512)))
    timbre = np.log(spectrum + 1e-2).mean(axis=0)
    return timbre - timbre.mean()


def _f0_hz(samples):
    """Returns the pitch of loud frames by autocorrelation."""
    found = []
    for start in range(0, len(samples) - 1200, 400):
        frame = samples[start : start + 1200].astype(float)
        if frame.std() > 1000:
            correlation = np.correlate(frame, frame, "full")[1199:]
            found.append(22_050 / (55 + correlation[55:370].argmax()))
    return np.array(found)
