"""From a corpus to batches: labels, features, and what cannot be trained on."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from experiments.data.speech.batches import Example, SpeechBatches
from experiments.data.speech.corpus import SAMPLE_RATE_HZ, Corpus, Utterances
from experiments.data.speech.features import (
    cmvn,
    log_mel,
    num_feature_frames,
    spec_augment,
)
from experiments.data.speech.vocabulary import Vocabulary
from experiments.harness.errors import DataError

_SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Features:
    """Normalized log-mel features of a split's utterances, read when they are needed.

    Attributes:
      utterances: the split.
      num_mels: features of a frame.
      augments: whether SpecAugment masks some, where there are random numbers.
    """

    utterances: Utterances
    num_mels: int
    augments: bool = False

    def __call__(self, index: int, rng: np.random.Generator | None) -> np.ndarray:
        """Returns (num_frames, num_mels) float32; see `SpeechBatches`."""
        samples = self.utterances.samples(index)
        features = cmvn(log_mel(samples, num_mels=self.num_mels))
        if self.augments and rng is not None:
            features = spec_augment(features, rng)
        return features


class PreparedCorpus(NamedTuple):
    """What a recognizer is trained and evaluated on.

    Attributes:
      name: of the corpus.
      vocabulary: its symbols.
      train: batches to train on; endless.
      val: batches of validation.
      test: batches of the test.
      left_out: utterances by split that are not in the batches, and why.
    """

    name: str
    vocabulary: Vocabulary
    train: SpeechBatches
    val: SpeechBatches
    test: SpeechBatches
    left_out: dict[str, dict[str, int]]

    def in_words(self) -> str:
        """Returns how many utterances there are, and how many are left out."""
        text = f"{self.train.num_examples:,} utterances of {self.name}"
        reasons = Counter[str]()
        for counts in self.left_out.values():
            reasons.update(counts)
        if reasons:
            text += ", left out: "
            text += ", ".join(f"{num:,} {reason}" for reason, num in reasons.items())
        return text


def prepare(
    corpus: Corpus,
    vocabulary: Vocabulary,
    num_outputs: Callable[[int], int],
    *,
    num_mels: int,
    augments: bool = False,
    **options: Any,
) -> PreparedCorpus:
    """Encodes the texts of a corpus and divides it into batches; reads no audio.

    Args:
      corpus: the corpus; of utterances that are neither too short nor too long. What a
        `Selection` left out is counted with what is left out here.
      vocabulary: symbols of all its texts.
      num_outputs: number of a model's outputs for a number of frames. An utterance with
        fewer than its labels (a repeated one counts twice) cannot be aligned, and is
        left out.
      num_mels: features of a frame.
      augments: whether SpecAugment masks features of the training set.
      **options: of `SpeechBatches`.

    Raises:
      DataError: if a split has no utterance that can be aligned, or a text has symbols
        outside of the vocabulary.
    """
    batches, left_out = {}, {}
    for split in _SPLITS:
        utterances: Utterances = getattr(corpus, split)
        examples = [_example(utterances, i, vocabulary) for i in range(len(utterances))]
        kept = [i for i, x in enumerate(examples) if _is_feasible(x, num_outputs)]
        if not kept:
            raise DataError(
                f"the {split} set of {corpus.name} has no utterance that can be "
                f"trained on, out of {len(examples)}: their texts are longer than the "
                "outputs of the network."
            )
        counts = Counter(getattr(utterances, "left_out", {}))
        counts["with more symbols than outputs"] = len(examples) - len(kept)
        if counts := +counts:  # without the zeros
            left_out[split] = dict(counts)
        features = Features(utterances, num_mels, augments and split == "train")
        batches[split] = SpeechBatches(
            [examples[i] for i in kept],
            _Chosen(features, tuple(kept)),
            num_features=num_mels,
            **options,
        )
    return PreparedCorpus(corpus.name, vocabulary, **batches, left_out=left_out)


def texts(corpus: Corpus) -> Iterable[str]:
    """Yields the texts of all splits."""
    for split in _SPLITS:
        utterances = getattr(corpus, split)
        for index in range(len(utterances)):
            yield utterances[index].text


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Features of some utterances, numbered anew."""

    features: Features
    indices: tuple[int, ...]

    def __call__(self, index: int, rng: np.random.Generator | None) -> np.ndarray:
        return self.features(self.indices[index], rng)


def _example(utterances: Utterances, index: int, vocabulary: Vocabulary) -> Example:
    utterance = utterances[index]
    num_samples = round(utterance.duration_s * SAMPLE_RATE_HZ)
    return Example(num_feature_frames(num_samples), vocabulary.encode(utterance.text))


def _is_feasible(example: Example, num_outputs: Callable[[int], int]) -> bool:
    labels = example.labels
    repeats = int(np.sum(labels[1:] == labels[:-1]))
    return 0 < len(labels) + repeats <= num_outputs(example.num_frames)
