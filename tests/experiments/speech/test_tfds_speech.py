"""Speech data sets of TFDS; those tests that need TensorFlow skip where it is not.

The weekly test installs TensorFlow into an environment of its own, and runs them there.
"""

import importlib.util
import subprocess
import tempfile
import venv
from pathlib import Path

import numpy as np
import pytest

from experiments.data.speech import tfds_speech
from experiments.data.speech.tfds_speech import load_tfds
from experiments.harness.errors import DataError

ROOT = Path(__file__).parents[3]
PACKAGES = (
    *("tensorflow-cpu", "tensorflow-datasets", "importlib-resources"),
    *("soundfile", "soxr", "filelock", "tqdm", "pytest"),
)
NEEDS_TENSORFLOW = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow"
)
NUM_EXAMPLES = {"train": 6, "validation": 2, "test": 3}


def samples_of(index: int) -> np.ndarray:
    rng = np.random.default_rng(index)
    return rng.integers(-(2**15), 2**15, 1_000 * (index + 1), np.int16)


def make_builder(num_examples, *, with_text=True, rate_hz: int | None = 8_000):
    """Returns a class of a TFDS builder, whose name is tiny_speech."""
    import tensorflow_datasets as tfds

    features = {"speech": tfds.features.Audio(sample_rate=rate_hz, dtype=np.int16)}
    if with_text:
        features |= {"text": tfds.features.Text(), "speaker_id": np.int64}

    class TinySpeech(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny_speech"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {name: self._examples(num) for name, num in num_examples.items()}

        def _generate_examples(self):
            raise NotImplementedError

        def _examples(self, num):
            for index in range(num):
                example = {"speech": samples_of(index)}
                if with_text:
                    example |= {"text": f"TEXT {index}", "speaker_id": index % 4}
                yield index, example

    return TinySpeech


@pytest.fixture
def prepare(tmp_path):
    """Prepares tiny_speech; returns TFDS's directory."""

    def download_and_prepare(*args, **kwargs) -> Path:
        data_dir = tmp_path / "tfds"
        make_builder(*args, **kwargs)(data_dir=str(data_dir)).download_and_prepare()
        return data_dir

    return download_and_prepare


def by_text(split) -> dict[str, int]:
    return {split[index].text: index for index in range(len(split))}


@NEEDS_TENSORFLOW
def test_a_prepared_data_set_is_read_whole(prepare):
    data_dir = prepare(NUM_EXAMPLES)
    corpus = load_tfds("tiny_speech", data_dir)
    assert (corpus.name, corpus.unit) == ("tiny_speech", "characters")
    assert corpus.has_words
    sizes = [len(corpus.train), len(corpus.val), len(corpus.test)]
    assert sizes == list(NUM_EXAMPLES.values())
    places = by_text(corpus.train)
    assert sorted(places) == [f"TEXT {index}" for index in range(6)]
    for index in range(6):
        utterance = corpus.train[places[f"TEXT {index}"]]
        assert utterance.speaker == str(index % 4)
        assert utterance.duration_s == (index + 1) / 8
        samples = corpus.train.samples(places[f"TEXT {index}"])
        assert samples.shape == (2_000 * (index + 1),)
    ids = {corpus.train[index].id for index in range(6)}
    assert len(ids) == 6


@NEEDS_TENSORFLOW
def test_samples_are_kept_bitwise_and_copied_once(prepare, monkeypatch):
    data_dir = prepare({"train": 4, "dev": 1, "test": 1}, rate_hz=16_000)
    load_tfds("tiny_speech", data_dir)
    monkeypatch.setattr(tfds_speech, "_write_tar", lambda *_: pytest.fail("again"))
    train = load_tfds("tiny_speech", data_dir).train
    for text, place in by_text(train).items():
        expected = samples_of(int(text.split()[1])) / np.float32(2**15)
        assert np.array_equal(train.samples(place), expected)


@NEEDS_TENSORFLOW
def test_a_single_split_is_divided_by_speaker(prepare):
    corpus = load_tfds("tiny_speech", prepare({"train": 12}))
    splits = [corpus.train, corpus.val, corpus.test]
    assert [len(split) for split in splits] == [6, 3, 3]
    held_out = [{split[i].speaker for i in range(len(split))} for split in splits]
    assert len(set.union(*held_out)) == sum(map(len, held_out)) == 4


@NEEDS_TENSORFLOW
def test_librispeech_of_tfds_on_mock_data(tmp_path):
    import tensorflow_datasets as tfds

    sizes = {"train_clean100": 5, "train_other500": 5, "dev_clean": 5, "test_clean": 5}
    write_metadata(tfds, tmp_path / "metadata", sizes)
    with tfds.testing.mock_data(num_examples=5, data_dir=str(tmp_path / "metadata")):
        corpus = load_tfds("librispeech", tmp_path / "unused")
    assert [len(corpus.train), len(corpus.val), len(corpus.test)] == [10, 5, 5]
    utterance = corpus.train[7]
    assert utterance.text
    assert utterance.speaker.isdecimal()
    samples = corpus.train.samples(7)
    assert samples.dtype == np.float32
    assert len(samples) == round(utterance.duration_s * 16_000) > 0


def write_metadata(tfds, data_dir: Path, sizes: dict[str, int]) -> None:
    """Writes what TFDS knows of a prepared LibriSpeech, without its records."""
    builder = tfds.builder("librispeech", data_dir=str(data_dir))
    splits = [
        tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=1)
        for name, size in sizes.items()
    ]
    builder.info.set_splits(tfds.core.splits.SplitDict(splits))
    folder = Path(str(builder.data_dir))
    folder.mkdir(parents=True)
    builder.info.write_to_directory(str(folder))


@NEEDS_TENSORFLOW
def test_other_data_sets_are_explained(prepare, tmp_path):
    with pytest.raises(DataError, match=r"not prepared\).*tfds build librispeech"):
        load_tfds("librispeech", tmp_path / "nothing")
    with pytest.raises(DataError, match="cannot read no_such_speech"):
        load_tfds("no_such_speech", tmp_path / "nothing")
    data_dir = prepare({"train": 3}, with_text=False)
    with pytest.raises(DataError, match=r"the features \{'speech': 'Audio'.*Text fea"):
        load_tfds("tiny_speech", data_dir)


@NEEDS_TENSORFLOW
def test_an_unknown_rate_is_explained(prepare):
    with pytest.raises(DataError, match="does not say its sample rate"):
        load_tfds("tiny_speech", prepare({"train": 3}, rate_hz=None))


@NEEDS_TENSORFLOW
def test_no_training_split_is_explained(prepare):
    with pytest.raises(DataError, match=r"has no split train\*, only \['test'\]"):
        load_tfds("tiny_speech", prepare({"test": 3}))


def test_without_tensorflow_the_remedies_are_named(monkeypatch):
    find_spec = importlib.util.find_spec

    def without_tensorflow(name, *args):
        return None if name == "tensorflow" else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_tensorflow)
    with pytest.raises(DataError, match=r"pip install tensorflow, or .*--manifest"):
        load_tfds("librispeech")


def test_samples_beyond_16_bits_are_refused():
    with pytest.raises(DataError, match="reaches from -5 to 40000; expected samples"):
        tfds_speech._wav_bytes(np.array([-5, 40_000]), 16_000)


@pytest.mark.weekly
def test_all_of_this_in_an_environment_with_tensorflow():
    with tempfile.TemporaryDirectory() as folder:  # 2 GB, which no run leaves behind
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--no-input", *PACKAGES]
        subprocess.run(install, check=True, timeout=900, stdin=subprocess.DEVNULL)
        command = [
            *(python, "-m", "pytest", "-q", "-m", "not weekly", __file__),
            *("-o", "addopts=", "-o", "filterwarnings=default"),
            *("-p", "no:cacheprovider", "--confcutdir", Path(__file__).parent),
        ]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
