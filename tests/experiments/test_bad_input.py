"""Bad input ends as a paragraph on stderr, and nothing is lost."""

import dataclasses
import re
import shutil
import sys
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
from helpers import cli_runs

from experiments import mnist_mlp
from experiments.benchmarks import parity
from experiments.harness import checkpoints, cli
from experiments.harness.recorder import read_rows
from mpjax import NonFiniteTrainingError, cost

SMALL = ("--dataset", "digits", "--num-units", "4", "--num-epochs", "1")
SMALL = (*SMALL, "--policy", "float32")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process; returns exit code and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, module=mnist_mlp, dataset=None):
        monkeypatch.setattr(sys, "argv", ["experiment", *map(str, flags)])
        main = module.main
        if dataset is not None:
            main = lambda config: module.main(config, dataset)
        with pytest.raises(SystemExit) as exit_info:
            cli.run(main, module.Config, doc=module.__doc__)
        return exit_info.value.code, capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = mnist_mlp.Config(
        dataset="digits", num_units=4, num_epochs=1, policy="float32", workdir=workdir
    )
    mnist_mlp.main(config)
    return workdir


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--policy", "mixed_flaot16"], "Did you mean 'mixed_float16'"),
        (["--policy", ""], "unknown policy"),
        (["--no-autocast", "--policy", "mixed_float8"], "only --autocast does"),
        (["--no-autocast", "--policy", "mixed_float8:all"], "only --autocast does"),
        (["--policies", "float32,mixed_bfloat61"], "'mixed_bfloat16'"),
        (["--policies", " , "], "--policies names no policy"),
        (["--policies", "float32,p=f32,c=f61"], "p=f32,c=f61"),
        (["--policy", "float64"], "JAX_ENABLE_X64"),
        (["--loss-scale", "sttaic:8"], "--loss-scale: cannot read"),
        (["--loss-scale", "static:-8"], "--loss-scale"),
        (["--num-units", "0"], "--num-units must be greater than zero, got 0"),
        (["--num-epochs", "0"], "--num-epochs must be greater than zero, got 0"),
        (["--batch-size", "-8"], "--batch-size must be greater than zero, got -8"),
        (["--learning-rate", "nan"], "--learning-rate must be"),
        (["--learning-rate", "inf"], "--learning-rate must be"),
        (["--max-consecutive-skipped", "0"], "--max-consecutive-skipped must be"),
        (["--num-checkpoints", "-1"], "--num-checkpoints must be 0 or more"),
        (["--seed", "-1"], "--seed must be"),
        (["--validation-split", "1"], "--validation-split must be between 0 and 1"),
        (["--dataset", "minst"], "--dataset must be one of mnist, digits"),
        (["--resume"], "--resume needs --workdir"),
        ([*SMALL, "--validation-split", "0.9999"], "leaves 0 of 1500 images"),
    ],
)
def test_a_setting_that_cannot_work_is_named(call, flags, words):
    code, err = call(*flags)
    assert code == 2
    assert_paragraph(err, words)


@pytest.mark.parametrize("module", [mnist_mlp, parity])
def test_a_mistyped_flag_exits_2_with_tyros_suggestion(call, module):
    code, err = call("--polices", "float32", module=module)
    assert code == 2
    assert "--policies" in err
    assert "Traceback" not in err


def test_a_mistyped_policy_of_the_parity_table_exits_2(call):
    code, err = call("--policies", "float32,float61", module=parity)
    assert code == 2
    assert_paragraph(err, "Did you mean")


@pytest.mark.weekly
def test_a_workdir_with_another_configuration_is_left_alone(call, finished):
    before = contents(finished)
    code, err = call(*SMALL, "--num-units", "5", "--seed", "3", "--workdir", finished)
    assert code == 1
    assert_paragraph(err, "num_units is 4 there and 5 here", "seed is 0 there and 3")
    assert contents(finished) == before


def test_a_workdir_that_holds_the_run_needs_resume(call, finished):
    before = contents(finished)
    code, err = call(*SMALL, "--workdir", finished)
    assert code == 1
    assert_paragraph(err, "pass --resume to continue it")
    assert contents(finished) == before


def test_a_workdir_in_use_by_another_process(call, finished):
    with filelock.FileLock(finished / ".lock"):
        code, err = call(*SMALL, "--workdir", finished, "--resume")
    assert code == 1
    assert_paragraph(err, "another process is running in")


def test_a_workdir_that_cannot_be_made(call, tmp_path):
    (tmp_path / "file").write_text("precious")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        code, err = call(*SMALL, "--workdir", workdir)
        assert code == 1
        assert_paragraph(err, "cannot use --workdir")
    assert (tmp_path / "file").read_text() == "precious"


def test_resume_of_a_directory_without_a_run_makes_nothing(call, tmp_path):
    code, err = call(*SMALL, "--resume", "--workdir", tmp_path / "new")
    assert code == 1
    assert_paragraph(err, "holds no run; leave --resume out")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", [b"{", b"[1]", b"null", b"\xff"])
def test_a_damaged_configuration_is_named(call, tmp_path, text):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes(text)
    code, err = call(*SMALL, "--resume", "--workdir", run)
    assert code == 1
    assert_paragraph(err, "config.json")


def test_a_data_dir_that_is_a_file(call, tmp_path):
    (tmp_path / "file").write_text("precious")
    code, err = call("--data-dir", tmp_path / "file", "--workdir", tmp_path / "run")
    assert code == 1
    assert_paragraph(err, "--data-dir")
    assert not (tmp_path / "run").exists()


@pytest.mark.weekly
def test_nan_in_the_data_ends_the_run_after_so_many_skips(call, tmp_path):
    data = with_nan()
    flags = ("--policy", "mixed_float16", "--num-units", 4, "--batch-size", 24)
    flags = (*flags, "--num-epochs", 20, "--loss-scale", "dynamic:8")
    flags = (*flags, "--max-consecutive-skipped", 7, "--workdir", tmp_path / "run")
    code, err = call(*flags, dataset=data)
    assert code == 1
    assert_paragraph(err, "training stopped", "not finite in 7 steps in a row")
    assert "args[1]['image']: already in an input" in " ".join(err.split())
    assert_skipped(tmp_path / "run")
    steps = {path.name for path in (tmp_path / "run").glob("*/checkpoints/*")}
    assert steps == {"4", "8"}
    code, again = call(*flags, "--resume", dataset=data)
    assert (code, again) == (1, err)
    assert_skipped(tmp_path / "run")


@pytest.mark.weekly
def test_nan_without_loss_scaling_is_an_error_to_a_caller_too(tmp_path):
    config = mnist_mlp.Config(
        policy="float32",
        num_units=4,
        num_epochs=9,
        max_consecutive_skipped=3,
        workdir=tmp_path / "run",
    )
    with pytest.raises(NonFiniteTrainingError, match="3 steps in a row") as error:
        mnist_mlp.main(config, with_nan())
    assert error.value.found.leaf == "args[1]['image']"
    assert error.value.found.index[1:] == (0, 0)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_an_error(tmp_path):
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource\n"
        "from experiments import mnist_mlp\n"
        "from experiments.harness import cli\n"
        "def main(config):\n"
        "    limits = (60_000, resource.RLIM_INFINITY)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, limits)\n"
        "    mnist_mlp.main(config)\n"
        "cli.run(main, mnist_mlp.Config, doc=None)\n"
    )
    flags = (*SMALL, "--num-epochs", 40, "--batch-size", 40, "--num-checkpoints", 0)
    flags = (*flags, "--workdir", tmp_path / "run")
    code, _, err = cli_runs.run(*flags, script=script, cached=False)
    assert code == 1
    assert_paragraph(err, "cannot write in", "File too large; free some space")
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize("when", ["asked", "written"])
def test_a_full_disk_keeps_the_checkpoints_before(call, monkeypatch, tmp_path, when):
    flags = (*SMALL, "--num-epochs", 4, "--workdir", tmp_path / "run")
    saved = []

    def fail_at_the_third(*args, **kwargs):
        saved.append(args)
        if len(saved) < 3:
            return original(*args, **kwargs)
        if when == "asked":
            return SimpleNamespace(free=1000)
        raise ValueError("RESOURCE_EXHAUSTED: no space\nand so on")

    place, name = shutil, "disk_usage"
    if when == "written":
        place, name = checkpoints.ocp.CheckpointManager, "save"
    original = getattr(place, name)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail_at_the_third)
        code, err = call(*flags)
    assert code == 1
    assert_paragraph(err, "cannot write checkpoint 3 to", "Free some space")
    steps = {path.name for path in (tmp_path / "run").glob("*/checkpoints/*")}
    assert "2" in steps


def assert_paragraph(err, *words):
    assert err.startswith("error:")
    assert "Traceback" not in err
    assert "\n\n" not in err
    text = " ".join(err.split())
    for each in words:
        assert each in text


def assert_skipped(workdir):
    """Three skips on the way down from 8, seven at 1; each is on disk, once."""
    (path,) = workdir.glob("*/metrics.jsonl")
    rows = [row for row in read_rows(path) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["loss_scale"] for row in rows] == [8, 4, 2] + [1] * 7
    assert all(row["grads_finite"] == 0 for row in rows)
    assert rows[-1]["num_skipped"] == 10
    assert np.isnan(rows[-1]["loss"])


def with_nan():
    data = cli_runs.images()
    pixels = data.x_train.astype(np.float32) / 255
    pixels[:, 0, 0] = np.nan
    return dataclasses.replace(data, x_train=pixels)


def contents(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_messages_are_not_broken_within_words(capsys):
    path = "/".join(["directory"] * 20)
    with pytest.raises(SystemExit):
        cli.fail(f"cannot use {path} at all; choose another\n    python -m {path} x", 3)
    err = capsys.readouterr().err
    assert len(re.findall(path, err)) == 2
    assert f"\n    python -m {path} x\n" in err


def test_a_gpu_that_cannot_be_compiled_for_is_an_error_of_any_command(
    call, monkeypatch
):
    monkeypatch.setattr("mpjax.cost._compile._PLUGINS", ())
    command = SimpleNamespace(
        main=lambda config: cost.analyze(lambda x: x + 1, 1.0, device="h100"),
        Config=mnist_mlp.Config,
    )
    code, err = call(module=command)
    assert code == 1
    assert_paragraph(err, "needs JAX's CUDA plugin", 'pip install "jax[cuda13]"')
