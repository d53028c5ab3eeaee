"""The corpus that the flags name."""

from typing import Any

from experiments.data.speech.aishell import load_aishell
from experiments.data.speech.config import TFDS, SpeechConfig
from experiments.data.speech.corpus import Corpus
from experiments.data.speech.librispeech import load_librispeech
from experiments.data.speech.mandarin import load_mandarin
from experiments.data.speech.manifest import load_manifest
from experiments.data.speech.selection import Selection, check_audio, select
from experiments.data.speech.tfds_speech import load_tfds


def load_corpus(config: SpeechConfig) -> Corpus:
    """Returns a corpus without what is too short, too long or unreadable.

    Raises:
      DataError: if it is unavailable or damaged, or if a split is empty.
    """
    corpus = _load(config)
    splits = {name: getattr(corpus, name) for name in ("train", "val", "test")}
    return corpus._replace(**{k: _select(config, v) for k, v in splits.items()})


def _load(config: SpeechConfig) -> Corpus:
    if config.manifest is not None:
        return load_manifest(config.manifest)
    if config.dataset == "mandarin":
        return load_mandarin(config.mandarin)
    if config.dataset.startswith(TFDS):
        return load_tfds(config.dataset.removeprefix(TFDS), config.data_dir)
    assert config.data_dir is not None  # checked by the config
    if config.dataset == "aishell":
        return load_aishell(config.data_dir, unit=config.unit)
    return load_librispeech(config.data_dir)


def _select(config: SpeechConfig, utterances: Any) -> Selection:
    chosen = select(
        utterances,
        min_duration_s=config.min_duration_s,
        max_duration_s=config.max_duration_s,
        skip_bad=config.skip_bad,
    )
    return check_audio(chosen, skip_bad=True) if config.skip_bad else chosen
