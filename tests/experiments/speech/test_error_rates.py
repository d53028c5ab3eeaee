"""Error rates by jiwer against the edit distance, written by hand."""

import pytest
from helpers.speech_runs import edit_distance
from hypothesis import given
from hypothesis import strategies as st

from experiments.models.recognition import error_rates

letters = st.text("abni你好", max_size=8)
pairs = st.lists(st.tuples(letters.filter(bool), letters), min_size=1, max_size=5)


@given(pairs)
def test_characters(pairs):
    said, heard = map(list, zip(*pairs, strict=True))
    errors = sum(map(edit_distance, said, heard))
    rates = error_rates(said, heard)
    assert rates == {"cer": pytest.approx(errors / sum(map(len, said)))}


words = st.lists(st.sampled_from(["ni", "n", "i", "hao", "ha"]), max_size=5)
sentences = st.lists(st.tuples(words.filter(bool), words), min_size=1, max_size=4)


@given(sentences)
def test_words(sentences):
    said, heard = zip(*sentences, strict=True)
    errors = sum(map(edit_distance, said, heard))
    texts = [[" ".join(words) for words in side] for side in (said, heard)]
    rates = error_rates(*texts, has_words=True)
    assert rates["wer"] == pytest.approx(errors / sum(map(len, said)))
    # A space is a character too.
    errors = sum(map(edit_distance, *texts))
    assert rates["cer"] == pytest.approx(errors / sum(map(len, texts[0])))
