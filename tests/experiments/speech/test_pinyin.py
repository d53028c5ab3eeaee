"""The syllables: how many, that they are Mandarin's, and that espeak-ng says them."""

import subprocess
import sys

import pytest

from experiments.data.speech import espeak, pinyin


def test_there_are_402_different_ones_of_small_letters():
    assert len(set(pinyin.SYLLABLES)) == len(pinyin.SYLLABLES) == 402
    assert list(pinyin.SYLLABLES) == sorted(pinyin.SYLLABLES)
    letters = set("".join(pinyin.SYLLABLES))
    assert letters == set("abcdefghijklmnopqrstuvwxyz")


def test_they_are_the_readings_of_chinese_characters():
    pypinyin = pytest.importorskip("pypinyin")
    from pypinyin.contrib.tone_convert import to_normal
    from pypinyin.pinyin_dict import pinyin_dict

    assert pypinyin.lazy_pinyin("绿", v_to_u=False) == ["lv"]
    readings = {
        to_normal(reading)
        for code, text in pinyin_dict.items()
        if 0x4E00 <= code < 0xA000
        for reading in text.split(",")
    }
    assert set(pinyin.SYLLABLES) <= readings
    first = {
        to_normal(text.split(",")[0])
        for code, text in pinyin_dict.items()
        if 0x4E00 <= code < 0xA000
    }
    # Interjections and dialect, and the three that espeak-ng spells out.
    rare = {"m", "n", "hm", "lo", "rua", "fiao", "eng", "nun"}
    assert first - set(pinyin.SYLLABLES) == rare | {"jiong", "qiong", "xiong"}


# Asks espeak-ng for the phonemes of each line of stdin, in a process of its own.
PHONEMES = """
import ctypes, sys
from experiments.data.speech.espeak import _library
from experiments.data.speech.espeak_worker import Espeak
library = Espeak(*_library(), seed=1)._library
library.espeak_SetVoiceByName(b"cmn")
library.espeak_TextToPhonemes.restype = ctypes.c_char_p
for line in sys.stdin:
    text = ctypes.c_char_p(line.strip().encode())
    print(library.espeak_TextToPhonemes(ctypes.byref(text), 1, 0).decode())
"""


def phonemes(texts):
    done = subprocess.run(
        [sys.executable, "-c", PHONEMES],
        input="\n".join(texts),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_espeak_says_each_in_mandarin_and_each_otherwise():
    """It goes over to English, and says so, where it does not know a syllable."""
    said = phonemes([f"{syllable}4" for syllable in pinyin.SYLLABLES])
    assert len(set(said)) == 402
    assert not any("(en)" in phoneme for phoneme in said)
    assert all("51" in phoneme for phoneme in said)  # the tone's pitch, falling
    missing = phonemes(["jiong4", "qiong4", "xiong4"])
    assert all("(en)" in phoneme for phoneme in missing)


def test_a_line_for_each_syllable_is_heard():
    syllables = pinyin.SYLLABLES[::13]
    lines = [espeak.Line("m3", f"{syllable}4", 175, 50) for syllable in syllables]
    audio, rate_hz = espeak.speak(lines)
    assert all(0.1 < len(samples) / rate_hz < 0.6 for samples in audio)
