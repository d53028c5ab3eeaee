"""From a corpus to batches: what is left out is counted, whoever leaves it out."""

import numpy as np
import pytest

from experiments.data.speech.corpus import SAMPLE_RATE_HZ, Corpus, Utterance
from experiments.data.speech.prepared import prepare, texts
from experiments.data.speech.selection import select
from experiments.data.speech.vocabulary import Vocabulary
from experiments.harness.errors import DataError


class Noise:
    """Utterances of noise; text and seconds of each are given."""

    def __init__(self, *utterances):
        self._utterances = utterances

    def __len__(self):
        return len(self._utterances)

    def __getitem__(self, index):
        text, duration_s = self._utterances[index]
        return Utterance(str(index), text, "", duration_s)

    def samples(self, index):
        num_samples = round(self[index].duration_s * SAMPLE_RATE_HZ)
        rng = np.random.default_rng(index)
        return rng.normal(0, 0.1, num_samples).astype(np.float32)


def make(*train):
    held_out = select(Noise(("ab", 0.5)))
    return Corpus(
        "noise", select(Noise(*train), min_duration_s=0.1), held_out, held_out, ""
    )


def prepared(corpus):
    return prepare(
        corpus,
        Vocabulary.of(texts(corpus)),
        lambda num_frames: num_frames // 2,
        num_mels=8,
        batch_size=2,
        seed=0,
        num_buckets=1,
    )


def test_what_is_left_out_is_counted_with_its_reason():
    # 0.2 s are 18 frames and 9 outputs; "aabbaa" takes 6 and a blank in 3 places.
    corpus = make(("ab", 0.5), ("a", 0.05), ("aabbaa", 0.2), ("aabbaab", 0.2))
    result = prepared(corpus)
    assert result.left_out == {
        "train": {"too short": 1, "with more symbols than outputs": 1}
    }
    assert result.train.num_examples == 2
    assert result.in_words() == (
        "2 utterances of noise, left out: 1 too short, 1 with more symbols than outputs"
    )


def test_batches_hold_the_features_and_labels_of_what_is_kept():
    corpus = make(("aabbaab", 0.2), ("b", 0.5), ("ab", 0.2))
    result = prepared(corpus)
    (batch,) = result.train.in_order()
    labels = [result.vocabulary.decode(row) for row in batch["labels"]]
    assert dict(zip(labels, batch["num_frames"].tolist(), strict=True)) == {
        "b": 48,
        "ab": 18,
    }
    shorter = batch["num_frames"].argmin()
    np.testing.assert_allclose(
        batch["features"][shorter, :18].mean(axis=0), 0, atol=1e-5
    )


def test_nothing_that_can_be_aligned_is_an_error():
    with pytest.raises(DataError, match=r"train set of noise.*out of 1"):
        prepared(make(("aabbaab", 0.2)))
