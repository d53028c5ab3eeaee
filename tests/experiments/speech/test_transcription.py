"""A trained run hears recordings, and a new run starts from its weights."""

import json
import shutil

import jax
import numpy as np
import pytest
import soundfile
import soxr
from helpers import speech_runs, tones

from experiments import speech_ctc
from experiments.data.speech.vocabulary import Vocabulary
from experiments.harness.errors import (
    AudioError,
    CheckpointError,
    ConfigError,
    WorkdirError,
)
from experiments.harness.stop import Interrupted
from experiments.models import fine_tuning
from experiments.models.recognition import error_rates
from experiments.models.transcription import transcribe

OUTPUT_LAYER = ("params.classes.kernel", "params.classes.bias")


@pytest.fixture(scope="module", autouse=True)
def frames_network():
    with speech_runs.frames_network():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run with two policies, of which the second has not begun."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with speech_runs.without_pictures():
        config = speech_runs.config(workdir, num_buckets=1)  # one program to compile
        speech_ctc.main(config, speech_runs.corpus())
    edit(workdir, policies="float32,mixed_bfloat16")
    return workdir


def edit(workdir, **settings):
    file = workdir / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def recordings(tmp_path):
    """Tones that are not in the training set, at another rate, in two formats."""
    utterances = tones.Tones(6, seed=9)
    files = []
    for index, text in enumerate(utterances.texts):
        file = tmp_path / f"{index}-{text}.{('wav', 'flac')[index % 2]}"
        samples = soxr.resample(utterances.samples(index), 16_000, 44_100)
        soundfile.write(file, np.stack([samples, samples], axis=1), 44_100)
        files.append(file)
    return tuple(files), utterances.texts


def hear(workdir, files, **flags):
    config = speech_ctc.Config(workdir=workdir, transcribe=tuple(files), **flags)
    return list(transcribe(config, speech_ctc.NAME))


@pytest.mark.parametrize("beam_width", [0, 4])
def test_it_hears_recordings_at_any_rate(trained, recordings, beam_width):
    files, texts = recordings
    before = speech_runs.snapshot(trained)
    heard = hear(trained, files, beam_width=beam_width)
    assert [x.file for x in heard] == list(files)
    assert {(x.policy, x.step) for x in heard} == {("float32", 72)}
    assert error_rates(texts, [x.text for x in heard])["cer"] < 0.4
    assert speech_runs.snapshot(trained) == before


def test_main_prints_a_line_for_each_file(trained, recordings, capsys):
    files, _ = recordings
    config = speech_ctc.Config(workdir=trained, transcribe=files[:2])
    assert speech_ctc.main(config) is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(": ")[0] for line in lines] == [
        f"{file}, float32 after 72 steps" for file in files[:2]
    ]


def test_every_trained_policy_hears_unless_one_is_chosen(copied, recordings):
    files, _ = recordings
    shutil.copytree(copied / "float32", copied / "mixed_bfloat16")
    heard = hear(copied, files[:1])
    assert [x.policy for x in heard] == ["float32", "mixed_bfloat16"]
    heard = hear(copied, files[:1], policy="mixed_bfloat16")
    assert [x.policy for x in heard] == ["mixed_bfloat16"]


def test_a_damaged_newest_checkpoint_is_passed_over_and_stays(
    copied, recordings, capsys
):
    newest = copied / "float32" / "checkpoints" / "72"
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(b"?")
    before = speech_runs.snapshot(copied)
    assert hear(copied, recordings[0][:1])[0].step == 66
    assert "checkpoint 72 is damaged" in capsys.readouterr().err
    assert speech_runs.snapshot(copied) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_units": 32}, "--num-units is 16 there and 32 here"),
        ({"encoder": "conformer"}, "'bigru' there and 'conformer' here"),
        ({"num_epochs": 7}, "--num-epochs is 12 there and 7 here"),
        ({"policy": "float16"}, "no policy 'float16'; it has float32, mixed_bfloat16"),
    ],
)
def test_flags_that_contradict_the_run_are_refused(trained, flags, message, recordings):
    with pytest.raises(ConfigError, match=message):
        hear(trained, recordings[0], **flags)


@pytest.mark.parametrize("flag", ["resume", "listen", "init_from"])
def test_flags_that_train_or_write_do_not_go_with_it(tmp_path, flag):
    with pytest.raises(ConfigError, match=f"leave --{flag.replace('_', '-')} out"):
        hear(tmp_path, ["a.wav"], **{flag: tmp_path})


def test_runs_that_cannot_hear_are_named(trained, copied, recordings, tmp_path):
    files, _ = recordings
    with pytest.raises(WorkdirError, match=r"nowhere holds no run"):
        hear(tmp_path / "nowhere", files)
    with pytest.raises(CheckpointError, match="no checkpoint of mixed_bfloat16"):
        hear(trained, files, policy="mixed_bfloat16")
    shutil.rmtree(copied / "float32" / "checkpoints")
    with pytest.raises(CheckpointError, match="until the end of an epoch"):
        hear(copied, files)
    edit(copied, num_checkpoints=0)
    with pytest.raises(CheckpointError, match="ran with --num-checkpoints 0"):
        hear(copied, files)
    edit(copied, experiment="mnist_mlp")
    with pytest.raises(WorkdirError, match="of mnist_mlp, expected speech_ctc"):
        hear(copied, files)


def test_weights_of_another_network_than_the_settings_say_are_refused(
    copied, recordings
):
    edit(copied, num_units=12)
    with pytest.raises(CheckpointError, match=r"\(16,\), expected \(12,\)"):
        hear(copied, recordings[0])


def test_recordings_that_cannot_be_heard_are_named(trained, tmp_path):
    text, short = tmp_path / "text.wav", tmp_path / "short.wav"
    text.write_text("no audio")
    soundfile.write(short, np.zeros(1000), 16_000)
    with pytest.raises(AudioError, match=r"text.wav cannot be read"):
        hear(trained, [text])
    with pytest.raises(AudioError, match=r"missing.wav cannot be read: No such file"):
        hear(trained, [tmp_path / "missing.wav"])
    with pytest.raises(AudioError, match=r"short.wav is too short: 0.062 s; .* 0.1 s"):
        hear(trained, [short])


def start(trained, workdir, letters, **flags):
    """Returns the initial variables of a run from another, by name."""
    workdir.mkdir(exist_ok=True)
    config = speech_ctc.Config(init_from=trained, workdir=workdir, **flags)
    config = fine_tuning.take_network(config, speech_ctc.NAME)
    vocabulary = Vocabulary.of([letters])
    init = fine_tuning.make_init_from(config, speech_ctc.NAME, vocabulary)
    params, model_state = init(jax.random.key(5))
    variables = {"params": params, "model_state": model_state}
    return speech_runs.by_name(variables), config


@pytest.mark.parametrize("letters", ["abcd", "abce", "xyz"])
def test_a_run_starts_from_anothers_weights(trained, tmp_path, letters, capsys):
    source = trained / "float32" if letters == "xyz" else trained
    ours, config = start(source, tmp_path / "new", letters)
    assert (config.num_units, config.num_mels) == (16, 16)
    theirs = speech_runs.newest(trained / "float32").state
    for name, value in ours.items():
        is_new = name in OUTPUT_LAYER and letters != "abcd"
        assert (value.shape, value.dtype) == (
            (*theirs[name].shape[:-1], len(letters) + 1 if is_new else value.shape[-1]),
            np.float32,
        )
        assert np.array_equal(value, theirs[name]) != is_new, name
    assert any("model_state" in name for name in ours)
    assert ("new output layer" in capsys.readouterr().out) == (letters != "abcd")


def test_the_new_run_needs_the_other_only_once(copied, tmp_path):
    ours, _ = start(copied, tmp_path / "new", "abce")
    shutil.copy(copied / "config.json", tmp_path / "new")
    shutil.rmtree(copied)
    again, _ = start(copied, tmp_path / "new", "abce", resume=True)
    assert all(np.array_equal(ours[name], again[name]) for name in again)


def test_another_network_or_no_match_is_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="--num-units is 16 there and 32 here"):
        start(trained, tmp_path, "abcd", num_units=32)
    with pytest.raises(WorkdirError, match="holds no run"):
        start(tmp_path / "nowhere", tmp_path, "abcd")
    with pytest.raises(CheckpointError, match="no checkpoint of mixed_bfloat16"):
        start(trained / "mixed_bfloat16", tmp_path, "abcd")

    def init(key):
        return {"units": {"kernel": 0.0}, "classes": {"kernel": 0.0, "bias": 0.0}}, {}

    is_trained = fine_tuning.make_trainable("params/classes", init)
    paths = ("classes/kernel", "classes/bias", "units/kernel")
    assert [is_trained(path) for path in paths] == [True, True, False]
    with pytest.raises(ConfigError, match="layers are params/units, params/classes"):
        fine_tuning.make_trainable("Dense", init)


@pytest.mark.weekly
def test_only_the_output_layer_learns_new_letters(trained, tmp_path):
    """In an interrupted and resumed run, from a manifest."""
    corpus = speech_runs.corpus(letters="abce", name="new")
    manifest = tones.write_manifest(tmp_path / "recordings", corpus)
    flags = {"init_from": trained, "trainable": "params/classes", "manifest": manifest}
    workdir = tmp_path / "new"
    config = speech_runs.config(workdir, num_epochs=8, **flags)
    with speech_runs.without_pictures():
        with (
            speech_runs.before_batch(9, speech_runs.stop),
            pytest.raises(Interrupted),
        ):
            speech_ctc.main(config)
        resumed = speech_runs.config(workdir, num_epochs=8, resume=True, **flags)
        result = speech_ctc.main(resumed)
    theirs = speech_runs.newest(trained / "float32").state
    ours = speech_runs.newest(workdir / "float32").state
    for name, value in ours.items():
        if name.startswith("params."):
            is_kept = name not in OUTPUT_LAYER
            assert np.array_equal(value, theirs[name]) == is_kept, name
    # On features that have never seen the new letter: 52 %, after 100 % at first.
    assert result.run("float32")["test_cer"] < 0.7
    assert not any("units" in name for name in ours if name.startswith("opt_state"))
    heard = hear(workdir, [tmp_path / "recordings" / "test-1.flac"])
    assert set(heard[0].text) <= set("abce")
