"""Speech data sets of TensorFlow Datasets, where TensorFlow is installed.

TFDS reads audio by TensorFlow, in order only. So a prepared data set is copied once
into the cache: a tar file per split, of 16-bit WAV files and their texts. Training
then reads at random, without TensorFlow.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from experiments.data import cache
from experiments.data.extra import import_extra
from experiments.data.speech import archives
from experiments.data.speech.corpus import Corpus
from experiments.data.speech.durations import recorded
from experiments.data.speech.recordings import Recording
from experiments.data.speech.speaker_split import split_by_speaker
from experiments.harness.errors import DataError, first_line
from experiments.harness.files import atomic_write

TEXT_NAMES = ("text", "transcript", "transcription", "sentence", "text_normalized")
SPEAKER_NAMES = ("speaker_id", "speaker", "client_id")
# The first split of each that the data set has is read; of train, all.
VAL_SPLITS = ("validation", "dev_clean", "dev", "valid", "val")
TEST_SPLITS = ("test_clean", "test")
TEXTS = "texts.jsonl"


class Names(NamedTuple):
    """The features of a data set that are read; `speaker` is "" where there is none."""

    audio: str
    text: str
    speaker: str
    rate_hz: int


def load_tfds(name: str, data_dir: str | os.PathLike[str] | None = None) -> Corpus:
    """Reads a prepared speech data set of TFDS: one with an Audio and a Text feature.

    Args:
      name: such as "librispeech" or "ljspeech".
      data_dir: TFDS's directory; by default its own.

    Raises:
      DataError: if TensorFlow is not installed, the data set is unknown, not prepared
        or has no such features, or the cache cannot be written.
    """
    tfds = _import_tfds()
    data_dir = os.fspath(data_dir) if data_dir else None
    with _explained(name, data_dir):
        builder = tfds.builder(name, data_dir=data_dir)
        names = _find_features(tfds, builder.info)
        chosen = _choose_splits(list(builder.info.splits), name)
        train, val, test = (
            [
                recording
                for split in splits
                for recording in _read_split(tfds, builder, split, names)
            ]
            for splits in chosen
        )
    if not (val and test):
        everything = [*train, *val, *test]
        train, val, test = split_by_speaker(everything, seed=0, name=name)
    label = name.replace("/", "-")
    parts = (
        recorded(part, name=f"tfds-{label}-{split}")
        for part, split in zip(
            (train, val, test), ("train", "val", "test"), strict=True
        )
    )
    has_words = any(" " in recording.text for recording in test)
    return Corpus(name, *parts, unit="characters", has_words=has_words)


def _import_tfds() -> Any:
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            "speech through TFDS needs TensorFlow, which decodes its audio: pip "
            "install tensorflow, or read LibriSpeech from its own folder with "
            "--dataset librispeech --data-dir DIR, or your recordings with --manifest."
        )
    try:
        tf = importlib.import_module("tensorflow")
        tfds = importlib.import_module("tensorflow_datasets")
        tf.config.set_visible_devices([], "GPU")  # they are JAX's
    except Exception as error:  # two libraries that do not fit raise anything
        raise DataError(
            f"TensorFlow or TFDS cannot be imported ({first_line(error)}); install "
            "versions that fit: pip install --upgrade tensorflow tensorflow-datasets"
        ) from error
    return tfds


@contextlib.contextmanager
def _explained(name: str, data_dir: str | None) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # TFDS raises what its readers raise: anything
        where = f" --data_dir {data_dir}" if data_dir else ""
        raise DataError(
            f"TFDS cannot read {name} ({first_line(error)}); prepare it first: tfds "
            f"build {name}{where}"
        ) from error


def _choose_splits(there: list[str], name: str) -> tuple[list[str], ...]:
    """Returns which splits to train on, to validate and to test with."""
    if not there:
        raise LookupError("it has no splits: it is not prepared")
    train = [split for split in there if split.startswith("train")]
    if not train:
        raise DataError(f"TFDS's {name} has no split train*, only {there}.")
    val = [split for split in VAL_SPLITS if split in there][:1]
    return train, val, [split for split in TEST_SPLITS if split in there][:1]


def _find_features(tfds: Any, info: Any) -> Names:
    features = dict(info.features)
    audio = _find(features, tfds.features.Audio, [])
    text = _find(features, tfds.features.Text, TEXT_NAMES)
    if not audio or not text:
        kinds = {key: type(feature).__name__ for key, feature in features.items()}
        raise DataError(
            f"TFDS's {info.name} has the features {kinds}; expected an Audio and a "
            "Text feature."
        )
    rate_hz = features[audio].sample_rate or (info.metadata or {}).get("sample_rate")
    if not rate_hz:
        raise DataError(f"TFDS's {info.name} does not say its sample rate.")
    speaker = next((key for key in SPEAKER_NAMES if key in features), "")
    return Names(audio, text, speaker, int(rate_hz))


def _find(features: dict[str, Any], kind: type, preferred: Any) -> str:
    """Returns the first feature of a kind, the preferred names before others."""
    found = [key for key, feature in features.items() if isinstance(feature, kind)]
    return next((key for key in preferred if key in found), found[0] if found else "")


def _read_split(
    tfds: Any, builder: Any, split: str, names: Names
) -> Iterator[Recording]:
    """Yields the recordings of a split, which it copies into the cache first."""
    label = builder.info.full_name.replace("/", "-")
    size = builder.info.splits[split].num_examples
    identity = repr((str(builder.data_dir), size, names)).encode()
    digest = hashlib.sha256(identity).hexdigest()[:16]
    path = cache.cache_dir() / "speech" / "tfds" / f"{label}-{split}-{digest}.tar"
    if not path.is_file():
        with cache.locked(path.parent):
            dataset = builder.as_dataset(split=split, shuffle_files=False)
            examples = tfds.as_numpy(dataset)
            bar = tqdm(examples, f"copying {split}", size, disable=None, leave=False)
            _write_tar(path, bar, names)
    members = {member.name: member for member in archives.members(path)}
    if TEXTS not in members:
        raise DataError(f"{path} holds no {TEXTS}; delete it and run again.")
    place = members[TEXTS]
    with path.open("rb") as file:
        file.seek(place.offset)
        lines = file.read(place.num_bytes).decode().splitlines()
    for line in lines:
        wav, text, speaker = json.loads(line)
        inside = (str(path), members[wav].offset, members[wav].num_bytes)
        label = f"{path}: {wav}"
        yield Recording(f"{split}/{wav[:-4]}", text, speaker, *inside, label)


def _write_tar(path: Path, examples: Any, names: Names) -> None:
    for left_by_a_killed_run in path.parent.glob(f".{path.name}.*"):
        left_by_a_killed_run.unlink()
    try:
        with atomic_write(path) as temporary, tarfile.open(temporary, "w:") as tar:
            lines = []
            for index, example in enumerate(examples):
                wav = f"{index:07}.wav"
                _add(tar, wav, _wav_bytes(example[names.audio], names.rate_hz))
                speaker = _text(example[names.speaker]) if names.speaker else ""
                lines.append(json.dumps([wav, _text(example[names.text]), speaker]))
            _add(tar, TEXTS, "\n".join(lines).encode())
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; make room (115 MB for an "
            "hour of audio at 16 kHz), or name another cache by MPJAX_DATA_DIR."
        ) from error


def _wav_bytes(samples: np.ndarray, rate_hz: int) -> bytes:
    """Returns a WAV: 16-bit of integers, which are of that range, and of floats."""
    samples = np.asarray(samples)
    if samples.dtype.kind in "iu":
        limits = np.iinfo(np.int16)
        if samples.size and not (
            limits.min <= samples.min() and samples.max() <= limits.max
        ):
            raise DataError(
                f"audio of TFDS reaches from {samples.min()} to {samples.max()}; "
                "expected samples of 16 bits."
            )
        samples = samples.astype(np.int16)
    stream = io.BytesIO()
    import_extra("soundfile", extra="speech").write(
        stream, samples, rate_hz, format="WAV", subtype="PCM_16"
    )
    return stream.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
