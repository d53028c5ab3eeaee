"""The picture of what a network hears, and when."""

import types

import matplotlib.image
import numpy as np
import pytest
from helpers import tones

from experiments.data.speech.vocabulary import Vocabulary
from experiments.models import posteriors
from experiments.models.recognizer import Recognizer

VOCABULARY = Vocabulary.of(["abcd 你$"])


@pytest.fixture
def recognizer():
    """Hears every symbol once, one after the other, and the first one twice."""

    def eval_step(state, batch):
        num_outputs = int(batch["num_frames"][0])
        path = np.zeros(num_outputs, int)
        symbols = [*range(1, VOCABULARY.size), 1]
        path[1 : 1 + 2 * len(symbols) : 2] = symbols
        probabilities = np.full((1, num_outputs, VOCABULARY.size), 0.01)
        probabilities[0, range(num_outputs), path] = 0.9
        return {
            "log_probabilities": np.log(probabilities),
            "num_outputs": np.array([num_outputs]),
        }

    return Recognizer(eval_step, types.SimpleNamespace(), VOCABULARY, num_mels=16)


@pytest.mark.parametrize("num", [1, 2, 7])
def test_it_hears_the_first_the_last_and_one_between(recognizer, num):
    utterances = tones.Tones(num, seed=0)
    heard = posteriors.hear(recognizer, utterances)
    indices = {1: [0], 2: [0, 1], 7: [0, 3, 6]}[num]
    assert [h.said for h in heard] == [utterances.texts[i] for i in indices]


def test_a_picture_labels_every_symbol_where_it_is_most_likely(recognizer, tmp_path):
    heard = posteriors.hear(recognizer, tones.Tones(2, seed=0))[-1]
    assert heard.heard == "".join(VOCABULARY.symbols) + VOCABULARY.symbols[0]
    path = tmp_path / "posteriors.png"
    posteriors.draw_posteriors(path, "$tones$", recognizer, tones.Tones(4, seed=0))
    image = matplotlib.image.imread(path)
    assert image.shape[0] > image.shape[1] > 1000
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 200
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_each_stretch_of_a_symbol_has_one_peak():
    values = np.array([0.1, 0.5, 0.9, 0.6, 0.1, 0.1, 0.3, 0.2, 0.0, 1.0])
    assert posteriors._peaks(values) == [2, 6, 9]
    assert posteriors._peaks(np.zeros(4)) == []
