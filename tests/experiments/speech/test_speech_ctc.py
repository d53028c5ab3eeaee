"""Training by CTC from end to end, on a language of tones and a network of frames.

`test_speech_ctc_network.py` does it with the real network.
"""

import shutil

import numpy as np
import pytest
from helpers import cli_runs, speech_runs

from experiments import speech_ctc
from experiments.harness.errors import ConfigError, WorkdirError
from experiments.harness.recorder import read_rows
from experiments.harness.stop import Interrupted
from experiments.models.recognizer import read_vocabulary

NUM_SHAPES = 2


@pytest.fixture(scope="module", autouse=True)
def frames_network():
    with speech_runs.frames_network():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run to the end: its directory, its result, and what it compiled and read."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with speech_runs.recorded() as record:
        result = speech_ctc.main(speech_runs.config(workdir), speech_runs.corpus())
    return workdir, result, record


def test_it_learns_the_letters(trained):
    workdir, result, _ = trained
    assert result.run("float32")["test_cer"] < 0.4
    rows = read_rows(workdir / "float32" / "metrics.jsonl")
    rates = [row["val_cer"] for row in rows if row["kind"] == "epoch"]
    assert rates[0] > 0.8 > 2 * rates[-1]
    assert all(row["num_infeasible"] == 0 for row in rows if row["kind"] == "train")


def test_it_compiles_the_step_once_per_shape(trained):
    _, result, record = trained
    shapes = {x["features"].shape for x in record.batches}
    assert len(shapes) == record.num_lowered == NUM_SHAPES
    assert len(record.batches) >= result.run("float32")["num_steps"] > 10 * NUM_SHAPES


def test_it_leaves_the_vocabulary_and_a_picture_of_posteriors(trained):
    workdir, _, _ = trained
    assert read_vocabulary(workdir).symbols == ("a", "b", "c", "d")
    picture = (workdir / "float32" / "posteriors.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


class Killed(BaseException):
    """As sudden as a signal that cannot be caught."""


def kill():
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "after", "resumed_at"),
    [
        pytest.param(speech_runs.stop, 9, 9, id="stopped within an epoch"),
        pytest.param(
            speech_runs.stop,
            12,
            12,
            id="stopped after an epoch",
            marks=pytest.mark.weekly,
        ),
        pytest.param(kill, 22, 18, id="killed", marks=pytest.mark.weekly),
    ],
)
def test_resumed_it_ends_bitwise_the_same(trained, tmp_path, how, after, resumed_at):
    workdir, _, record = trained
    settings = speech_runs.config(tmp_path / "run")
    with (
        speech_runs.without_pictures(),
        speech_runs.before_batch(after, how),
        speech_runs.recorded() as first,
        pytest.raises((Killed, Interrupted)),
    ):
        speech_ctc.main(settings, speech_runs.corpus())
    assert read_vocabulary(tmp_path / "run").symbols == ("a", "b", "c", "d")
    resume = speech_runs.config(tmp_path / "run", resume=True)
    with speech_runs.without_pictures(), speech_runs.recorded() as second:
        speech_ctc.main(resume, speech_runs.corpus())
    batches = first.batches[:resumed_at] + second.batches
    assert_same_batches(batches, record.batches)
    directories = [path / "float32" for path in (tmp_path / "run", workdir)]
    ours, theirs = map(cli_runs.rows_without_times, directories)
    assert ours == theirs
    ours, theirs = map(speech_runs.newest, directories)
    assert ours.step == theirs.step
    assert_same_arrays(ours.state, theirs.state)
    ours, theirs = map(cli_runs.result_without_times, (tmp_path / "run", workdir))
    assert ours == theirs


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_arrays(a, b)


def assert_same_arrays(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_a_corpus_of_other_symbols_cannot_go_on(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    for name in ("result.json", "float32/result.json"):
        (workdir / name).unlink()
    resume = speech_runs.config(workdir, resume=True)
    other = speech_runs.corpus(letters="abce")
    with pytest.raises(WorkdirError, match="only there 'd'"):
        speech_ctc.main(resume, other)


@pytest.mark.slow
def test_listen_writes_sound_and_pictures_and_trains_nothing(tmp_path, capsys):
    settings = speech_runs.config(None, listen=tmp_path / "examples")
    assert speech_ctc.main(settings, speech_runs.corpus()) is None
    files = sorted((tmp_path / "examples").iterdir())
    assert [f.suffix for f in files] == [".png", ".wav"] * (len(files) // 2)
    assert len(files) == 12
    assert sorted(capsys.readouterr().out.split()) == [str(f) for f in files]
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["examples"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_units": 0}, "--num-units must be greater than zero"),
        ({"num_epochs": 0}, "--num-epochs"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"momentum": 1.0}, "--momentum must be from 0 to less than 1"),
        ({"beam_width": -1}, "--beam-width must be 0 or more"),
        ({"batch_size": 10, "num_microbatches": 4}, "4 must divide --batch-size 10"),
        ({"dataset": "aishell"}, "needs --data-dir"),
        ({"dataset": "mandarine"}, "--dataset must be one of mandarin"),
        ({"trainable": "classes"}, "--trainable needs --init-from"),
        ({"init_from": "run", "trainable": "("}, "no regular expression"),
        ({"transcribe": ("a.wav",)}, "--transcribe needs --workdir"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        speech_ctc.Config(**flags)
