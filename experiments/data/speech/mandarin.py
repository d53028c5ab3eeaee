"""A Mandarin corpus, synthesised by espeak-ng from random pinyin phrases.

Texts are pinyin letters without spaces ("nihaoma"): a space is nothing that is heard,
yet would ask CTC for frames of its own, which fast syllables of six letters do not
have. With `tones` each syllable ends with the digit of its tone ("ni3hao3ma1");
without, the tones are heard and not written. The held-out phrases stand in no training
utterance, not even as a part of it, whatever the tones, and the voices of the three
splits differ.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Generator
from pathlib import Path

import numpy as np

from experiments.data import cache
from experiments.data.speech import espeak, stored, voices
from experiments.data.speech.corpus import Corpus
from experiments.data.speech.mandarin_config import MandarinConfig
from experiments.data.speech.phrases import Phrases, Planned
from experiments.data.speech.stored import Recording, StoredUtterances
from experiments.data.speech.synthesis import Noise, synthesise
from experiments.harness.errors import DataError

FORMAT_VERSION = 1
"""To be raised whenever the same settings give other audio."""

_SPLITS = ("train", "val", "test")
_BYTES_PER_SYLLABLE = 10_000
_BYTES_OF_SILENCE = 8_000


def load_mandarin(config: MandarinConfig) -> Corpus:
    """Returns the corpus, synthesising it the first time.

    10,000 utterances take half a minute on two cores and 330 MB in the cache.

    It is cached under `cache_dir()/speech` by its settings and the versions of what
    made it, and checked each time.

    Args:
      config: what to synthesise.

    Raises:
      ConfigError: if the syllables do not give so many phrases.
      DataError: if espeak-ng is not installed or fails, or the cache cannot be written.
    """
    path = cache.cache_dir() / "speech" / f"mandarin-{_digest(config)}.npy"
    splits = _from_cache(path)
    if splits is None:  # only synthesis needs the lock and a writable directory
        with cache.locked(path.parent):
            splits = _from_cache(path, report=False)  # another run may have made it
            if splits is None:
                with contextlib.closing(_recordings(config)) as made:
                    stored.write(path, made, _expected_bytes(config))
                splits = stored.read(path)
    if splits is None:
        raise DataError(f"{path} has gone as soon as it was written; run again.")
    unit = "pinyin letters and tones" if config.tones else "pinyin letters"
    return Corpus("espeak Mandarin", *(splits[s] for s in _SPLITS), unit=unit)


def plan(config: MandarinConfig) -> dict[str, list[Planned]]:
    """Returns what is said, by split; takes no espeak-ng.

    Raises:
      ConfigError: if the syllables do not give so many phrases.
    """
    rng = np.random.default_rng(config.seed)
    phrases = Phrases(rng, config.num_syllables, config.tones)
    lengths = config.min_syllables, config.max_syllables
    held_out = phrases.held_out(config.num_val + config.num_test, *lengths)
    texts = {"".join(phrase) for phrase in held_out}
    said = {
        "train": phrases.without(texts, config.num_train, *lengths),
        "val": held_out[: config.num_val],
        "test": held_out[config.num_val :],
    }
    speakers = {
        "train": voices.TRAIN_VOICES,
        "val": voices.VAL_VOICES,
        "test": voices.TEST_VOICES,
    }
    rates_wpm = range(config.min_rate_wpm, config.max_rate_wpm + 1)
    return {s: phrases.plan(said[s], speakers[s], rates_wpm) for s in _SPLITS}


def _recordings(config: MandarinConfig) -> Generator[Recording, None, None]:
    planned = [(split, item) for split, items in plan(config).items() for item in items]
    noise = Noise(config.min_snr_db, config.max_snr_db)
    audio = synthesise([item for _, item in planned], noise, config.seed)
    for (split, item), samples in zip(planned, audio, strict=True):
        yield Recording(split, item.text, item.line.voice, samples)


def _digest(config: MandarinConfig) -> str:
    made_by = {"format": FORMAT_VERSION, "espeak": espeak.version()}
    text = json.dumps({**dataclasses.asdict(config), **made_by}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _expected_bytes(config: MandarinConfig) -> int:
    num_utterances = config.num_train + config.num_val + config.num_test
    num_syllables = num_utterances * (config.min_syllables + config.max_syllables) / 2
    return int(_BYTES_PER_SYLLABLE * num_syllables + _BYTES_OF_SILENCE * num_utterances)


def _from_cache(
    path: Path, *, report: bool = True
) -> dict[str, StoredUtterances] | None:
    try:
        return stored.read(path)
    except DataError as error:
        if report:
            cache.report(f"the cached {path} is damaged ({error}); making it anew")
        return None
