"""Beam search against the sum over all alignments."""

import collections
import itertools

import numpy as np
import pytest

from experiments.data.speech.vocabulary import collapse
from experiments.models.speech.decoding import beam_search


def random_frames(seed, num_frames, num_symbols, sharpness=1.0):
    logits = np.random.default_rng(seed).normal(size=(num_frames, num_symbols))
    logits *= sharpness
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def exhaustive(log_probabilities):
    """The most probable sequence, by the sum over every path."""
    num_frames, num_symbols = log_probabilities.shape
    totals = collections.Counter()
    for path in itertools.product(range(num_symbols), repeat=num_frames):
        probability = np.exp(log_probabilities[range(num_frames), path].sum())
        totals[tuple(collapse(path))] += probability
    return list(max(totals, key=totals.__getitem__))


@pytest.mark.parametrize("seed", range(12))
def test_a_wide_beam_is_exact(seed):
    frames = random_frames(seed, num_frames=5, num_symbols=4)
    assert beam_search(frames, beam_width=400) == exhaustive(frames)


def test_it_sums_over_alignments_where_the_best_path_does_not():
    # The path of blanks is the most probable, 0.36; "1" has the other 0.64.
    frames = np.log([[0.6, 0.4], [0.6, 0.4]])
    assert collapse(frames.argmax(axis=1)) == []
    assert beam_search(frames, beam_width=2) == [1]


def test_a_symbol_twice_needs_a_blank_between():
    one, blank = [0.01, 0.99], [0.99, 0.01]
    assert beam_search(np.log([one, one])) == [1]
    assert beam_search(np.log([one, blank, one])) == [1, 1]


def test_what_is_certain_is_found_by_the_narrowest_beam():
    frames = random_frames(3, num_frames=30, num_symbols=8, sharpness=50)
    assert beam_search(frames, beam_width=1) == collapse(frames.argmax(axis=1))


def test_no_frames_say_nothing_and_bad_input_is_refused():
    assert beam_search(np.zeros((0, 5))) == []
    with pytest.raises(ValueError, match="1 or more"):
        beam_search(np.zeros((2, 5)), beam_width=0)
    with pytest.raises(ValueError, match="NaN"):
        beam_search(np.full((2, 5), np.nan))
