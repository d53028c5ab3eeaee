"""The vocabulary: numbers there and back, what is outside, and CTC's collapse."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.speech.vocabulary import Vocabulary, collapse
from experiments.harness.errors import ConfigError, DataError

TEXTS = st.text("ab z1'é你好𠀀", min_size=1, max_size=20)


@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_texts_go_there_and_back(texts):
    vocabulary = Vocabulary.of(texts)
    for text in texts:
        numbers = vocabulary.encode(text)
        assert numbers.dtype == np.int32
        assert numbers.min() >= 1
        assert numbers.max() < vocabulary.size
        assert vocabulary.decode(numbers) == text
    assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == (
        vocabulary
    )


def test_numbers_begin_after_the_blank():
    vocabulary = Vocabulary.of(["nihao", "你"])
    assert vocabulary.symbols == ("a", "h", "i", "n", "o", "你")
    assert vocabulary.size == 7
    assert vocabulary.encode("a你").tolist() == [1, 6]
    assert vocabulary.encode("").tolist() == []
    assert vocabulary.encode("").dtype == np.int32
    assert vocabulary.decode([0, 1, 0, 6]) == "a你"


def test_all_characters_outside_are_listed():
    with pytest.raises(ConfigError, match=r"outside the vocabulary: '!' 'b' '好'"):
        Vocabulary.of(["a"]).encode("ab好a!b")


@pytest.mark.parametrize("number", [-1, 3])
def test_numbers_outside_are_refused(number):
    with pytest.raises(DataError, match=r"from 0 to 2, got \[-?\d\]"):
        Vocabulary(("a", "b")).decode([1, number])


@pytest.mark.parametrize("symbols", [(), ("a", "a"), ("ab",), ("",), (1,)])
def test_symbols_are_different_single_characters(symbols):
    with pytest.raises(DataError, match="different single characters"):
        Vocabulary(symbols)


@pytest.mark.parametrize("value", [None, [], {}, {"symbols": "ab"}, {"symbols": [1]}])
def test_other_json_is_refused(value):
    with pytest.raises(DataError, match="vocabulary"):
        Vocabulary.from_json(value)


@given(st.lists(st.integers(0, 3), max_size=12))
def test_collapse_is_the_definition(path):
    merged = [n for i, n in enumerate(path) if i == 0 or path[i - 1] != n]
    assert collapse(path) == [n for n in merged if n != 0]
    assert collapse(np.array(path, np.int32)) == collapse(path)
