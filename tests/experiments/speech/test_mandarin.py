"""The synthetic corpus: what is said, that it is heard, again the same, and cached."""

import concurrent.futures
import dataclasses
import os
import sys

import numpy as np
import pytest

from experiments.data.speech import espeak, mandarin, pinyin, synthesis, voices
from experiments.data.speech.mandarin import MandarinConfig, load_mandarin, plan
from experiments.harness.errors import ConfigError, DataError

SMALL = MandarinConfig(num_train=40, num_val=5, num_test=6)


@pytest.fixture
def cached(monkeypatch, tmp_path):
    monkeypatch.setenv("MPJAX_DATA_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "speech"


@pytest.fixture
def no_espeak(monkeypatch):
    def refuse(lines):
        raise DataError("said again")

    monkeypatch.setattr(espeak, "speak", refuse)


def everything(corpus):
    return [
        (split[i], split.samples(i).tobytes())
        for split in (corpus.train, corpus.val, corpus.test)
        for i in range(len(split))
    ]


def test_the_corpus_is_what_was_planned(cached):
    corpus = load_mandarin(SMALL)
    assert (corpus.name, corpus.unit) == ("espeak Mandarin", "pinyin letters")
    assert not corpus.has_words
    planned = plan(SMALL)
    for name, split in zip(planned, corpus[1:4], strict=True):
        assert len(split) == len(planned[name]) == getattr(SMALL, f"num_{name}")
        for i, item in enumerate(planned[name]):
            assert split[i].text == item.text
            assert split[i].speaker == item.line.voice
            samples = split.samples(i)
            assert samples.dtype == np.float32
            assert split[i].duration_s == len(samples) / 16_000
            num_syllables = len(item.line.text.split())
            assert 0.08 < split[i].duration_s / num_syllables < 1.0
            assert 0.03 < np.abs(samples).max() <= 0.99


def test_it_is_the_same_again_from_the_cache_and_anew(
    cached, monkeypatch, tmp_path, capsys
):
    first = everything(load_mandarin(SMALL))
    with monkeypatch.context() as patch:
        patch.setattr(espeak, "speak", None)  # the cache needs no espeak-ng
        assert everything(load_mandarin(SMALL)) == first
    monkeypatch.setenv("MPJAX_DATA_DIR", str(tmp_path / "other"))
    assert everything(load_mandarin(SMALL)) == first
    assert capsys.readouterr().err == ""
    other = load_mandarin(dataclasses.replace(SMALL, seed=1))
    assert everything(other) != first


def test_damage_is_reported_and_made_anew(cached, capsys):
    first = everything(load_mandarin(SMALL))
    (path,) = cached.glob("*.npy")
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    assert everything(load_mandarin(SMALL)) == first
    assert "is damaged" in capsys.readouterr().err
    assert everything(load_mandarin(SMALL)) == first
    assert capsys.readouterr().err == ""


def test_the_number_of_processes_changes_nothing(monkeypatch):
    monkeypatch.setattr(synthesis, "CHUNK_SIZE", 7)
    planned = plan(SMALL)["train"][:24]
    heard = {}
    for num in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda num=num: num)
        heard[num] = list(synthesis.synthesise(planned, synthesis.Noise(15, 35), 0))
    assert len(heard[1]) == 24
    for one, three in zip(heard[1], heard[3], strict=True):
        assert np.array_equal(one, three)


def test_two_runs_at_once_make_it_once(cached, monkeypatch):
    made = []
    speak = espeak.speak
    monkeypatch.setattr(
        espeak, "speak", lambda lines: (made.append(1), speak(lines))[1]
    )
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        one, two = pool.map(load_mandarin, [SMALL, SMALL])
    assert everything(one) == everything(two)
    assert len(made) == 1


def test_a_failure_of_espeak_leaves_nothing_and_ends(cached, no_espeak):
    with pytest.raises(DataError, match="said again"):
        load_mandarin(SMALL)
    assert [path.name for path in cached.iterdir()] == [".lock"]


def test_a_full_disk_says_how_much_room_the_corpus_needs(cached, small_disk):
    with (
        small_disk(),
        pytest.raises(DataError, match=r"make room \(2 MB are needed\)") as caught,
    ):
        load_mandarin(SMALL)
    assert "MNIST" not in str(caught.value)
    assert [path.name for path in cached.iterdir()] == [".lock"]


def test_the_settings_and_versions_are_in_the_name(monkeypatch):
    names = {
        mandarin._digest(SMALL),
        mandarin._digest(dataclasses.replace(SMALL, max_snr_db=36)),
        mandarin._digest(dataclasses.replace(SMALL, tones=True)),
    }
    monkeypatch.setattr(espeak, "version", lambda: "9.9")
    names.add(mandarin._digest(SMALL))
    monkeypatch.setattr(mandarin, "FORMAT_VERSION", 99)
    names.add(mandarin._digest(SMALL))
    assert len(names) == 5


def test_a_missing_resampler_names_the_command(monkeypatch, cached):
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(DataError, match=r'pip install -e "\.\[speech\]"'):
        load_mandarin(SMALL)


@pytest.mark.parametrize(
    "config",
    [
        MandarinConfig(num_train=4000, num_val=1000, num_test=1000),
        MandarinConfig(num_train=500, num_val=20, num_test=20, num_syllables=20),
        MandarinConfig(num_train=500, tones=True, min_syllables=3, max_syllables=8),
    ],
)
def test_held_out_phrases_stand_in_no_training_utterance(config):
    planned = plan(config)
    letters = {
        name: ["".join(c for c in item.text if c.isalpha()) for item in items]
        for name, items in planned.items()
    }
    held_out = letters["val"] + letters["test"]
    assert len(set(held_out)) == len(held_out) == config.num_val + config.num_test
    training = "|".join(letters["train"])
    assert not any(text in training for text in held_out)
    speakers = {
        name: {item.line.voice for item in items} for name, items in planned.items()
    }
    assert speakers["train"] <= set(voices.TRAIN_VOICES)
    assert speakers["val"] <= set(voices.VAL_VOICES)
    assert speakers["test"] <= set(voices.TEST_VOICES)
    assert min(map(len, speakers.values())) >= 4
    lengths = {len(item.line.text.split()) for item in planned["train"]}
    assert lengths == set(range(config.min_syllables, config.max_syllables + 1))
    spoken = {
        syllable[:-1]
        for item in planned["train"]
        for syllable in item.line.text.split()
    }
    assert len(spoken) == config.num_syllables
    assert spoken <= set(pinyin.SYLLABLES)
    for item in planned["train"]:
        said = item.line.text.replace(" ", "")
        written = said if config.tones else "".join(c for c in said if c.isalpha())
        assert item.text == written


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_train": 0}, "mandarin.num-train must be 1 or more, got 0"),
        ({"num_test": 0}, "mandarin.num-test must be"),
        (
            {"num_syllables": 403},
            "mandarin.num-syllables must be from 1 to 402, got 403",
        ),
        ({"max_syllables": 1}, "mandarin.max-syllables must be 2 or more, got 1"),
        ({"min_syllables": 6}, "mandarin.max-syllables must be 6 or more, got 5"),
        ({"min_snr_db": 40.0}, "mandarin.max-snr-db must be"),
        ({"min_snr_db": float("nan")}, "mandarin.max-snr-db must be"),
        ({"max_rate_wpm": 500}, "mandarin.max-rate-wpm must be"),
        ({"seed": -1}, "mandarin.seed must be 0 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        MandarinConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_syllables": 3, "max_syllables": 2}, "9 different phrases"),
        (
            {"num_syllables": 2, "max_syllables": 2, "num_val": 2, "num_test": 2},
            "avoid the test's",
        ),
    ],
)
def test_too_few_phrases_are_explained(settings, match):
    sizes = {"num_train": 50, "num_val": 20, "num_test": 20, "min_syllables": 2}
    settings = {**sizes, **settings}
    with pytest.raises(ConfigError, match=match):
        plan(MandarinConfig(**settings))


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_the_noise_is_as_loud_as_asked(snr_db):
    seconds = np.arange(32_000) / 16_000
    speech = np.sin(2 * np.pi * 440 * seconds).astype(np.float32)
    levels = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = synthesis.Noise(snr_db, snr_db)
        audio = synthesis.add_noise(speech, noise, rng)
        assert audio.dtype == np.float32
        assert np.abs(audio).max() <= 0.99
        assert 0.04 <= (len(audio) - len(speech)) / 16_000 <= 0.3
        spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))) ** 2
        tone = np.abs(np.fft.rfftfreq(len(audio), 1 / 16_000) - 440) < 5
        signal, rest = spectrum[tone].sum(), spectrum[~tone].sum()
        # The window weighs the two silences, at most 0.15 s of 2.3 s each, least.
        assert abs(10 * np.log10(signal / rest) - snr_db) < 1.0
        levels.append(20 * np.log10(audio.std()))
    assert max(levels) - min(levels) > 5
