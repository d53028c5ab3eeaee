"""Examples to listen to: what the files hold."""

import wave

import numpy as np
import pytest
from PIL import Image

from experiments.data.speech import listen, stored
from experiments.data.speech.corpus import Corpus
from experiments.harness.errors import DataError


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    told = [
        stored.Recording(split, text, "m$3", rng.integers(-9000, 9000, 8000, np.int16))
        for split in ("train", "val", "test")
        for text in ("nihao", "你好", "$a_b$")
    ]
    stored.write(tmp_path / "a.npy", iter(told), 0)
    splits = stored.read(tmp_path / "a.npy")
    return Corpus("x", splits["train"], splits["val"], splits["test"], unit="letters")


def test_each_example_is_a_wav_and_a_picture(tmp_path, corpus):
    files = listen.write_examples(tmp_path / "deeper" / "out", corpus, num=3)
    names = [path.name for path in files if path.suffix == ".wav"]
    assert names == [
        "train-000000.wav",
        "val-000000.wav",
        "test-000000.wav",
    ]
    assert sorted(p.name for p in (tmp_path / "deeper" / "out").iterdir()) == sorted(
        p.name for p in files
    )
    with wave.open(str(files[0])) as file:
        assert file.getparams()[:4] == (1, 2, 16_000, 8000)
        heard = np.frombuffer(file.readframes(8000), np.int16)
    np.testing.assert_allclose(heard / 32767, corpus.train.samples(0), atol=5e-5)
    for path in files[1::2]:
        with Image.open(path) as picture:
            colors = picture.convert("RGB").getcolors(picture.width * picture.height)
        assert colors is not None
        assert len(colors) > 200


def test_no_more_are_written_than_there_are(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(listen, "_draw", lambda path, *_: path.touch())
    files = listen.write_examples(tmp_path / "out", corpus, num=100)
    assert len(files) == 2 * 9


def test_a_directory_that_cannot_be_made_is_explained(tmp_path, corpus):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="cannot write"):
        listen.write_examples(tmp_path / "file" / "out", corpus)
