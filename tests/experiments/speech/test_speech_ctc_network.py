"""The real network from the command line: training, transcription, errors."""

import pytest
from helpers import cli_runs, speech_runs, tones

from experiments import speech_ctc

MODULE = "experiments.speech_ctc"
FLAGS = [
    flag
    for name, value in {**tones.SETTINGS, "num_epochs": 30}.items()
    for flag in (f"--{name.replace('_', '-')}", value)
]


@pytest.mark.weekly
def test_it_learns_from_a_manifest_and_hears(tmp_path):
    corpus = tones.corpus(lengths=(4,))
    manifest = tones.write_manifest(tmp_path / "recordings", corpus)
    workdir = tmp_path / "run"
    flags = (*FLAGS, "--manifest", manifest, "--workdir", workdir)
    code, out, err = cli_runs.run(*flags, module=MODULE)
    assert code == 0, err
    assert "48 utterances of tones" in out
    (run,) = cli_runs.result_without_times(workdir)
    assert run["test_cer"] < 0.5
    assert (workdir / "float32" / "posteriors.png").stat().st_size > 10_000
    said = corpus.test[1].text
    file = tmp_path / "recordings" / "test-1.flac"
    flags = ("--workdir", workdir, "--transcribe", file)
    code, out, err = cli_runs.run(*flags, module=MODULE)
    assert (code, err) == (0, "")
    start, _, heard = out.strip().rpartition(": ")
    assert start == f"{file}, float32 after 180 steps"
    assert speech_runs.edit_distance(said, heard) <= 2


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--transcribe", "a.wav"), 2, "--transcribe needs --workdir"),
        (("--workdir", "{}", "--transcribe", "a.wav"), 1, "holds no run"),
        (("--manifest", "{}/none.jsonl"), 1, "manifest {}/none.jsonl cannot be read"),
    ],
)
def test_errors_are_a_paragraph(tmp_path, flags, code, message):
    flags = [flag.format(tmp_path) for flag in flags]
    got, out, err = cli_runs.run(*flags, module=MODULE)
    assert (got, out) == (code, "")
    assert message.format(tmp_path) in " ".join(err.split())
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.weekly
@pytest.mark.parametrize("encoder", ["bilstm", "gru_lookahead", "conformer"])
def test_other_encoders_learn_and_hear(tmp_path, encoder):
    policies, num_epochs = "mixed_bfloat16", 30
    config = speech_runs.config(
        tmp_path / "run", encoder=encoder, policies=policies, num_epochs=num_epochs
    )
    corpus = tones.corpus(lengths=(4,))
    result = speech_ctc.main(config, corpus)
    assert result.run("mixed_bfloat16")["test_cer"] < 0.7
