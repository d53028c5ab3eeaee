"""Damaged checkpoints: reported, set aside, and without effect on the result."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cli_runs

from experiments import mnist_mlp
from experiments.harness import checkpoints, cli, loop
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.errors import CheckpointError
from experiments.harness.files import read_json

pytestmark = pytest.mark.weekly


class Stop(Exception):
    """Ends a run from inside."""


CONFIG = mnist_mlp.Config(
    policy="mixed_float16",
    num_units=8,
    batch_size=30,
    num_epochs=5,
    num_checkpoints=3,
    loss_scale="dynamic:2**24,growth_interval=4",
)
STEPS_PER_EPOCH = 4


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    mnist_mlp.main(with_workdir(workdir), cli_runs.images())
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that ended after three of five epochs."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"

    def stop_after_three(experiment, row, num_epochs):
        if row["epoch"] == 3:
            raise Stop
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "epoch_line", stop_after_three)
        with pytest.raises(Stop):
            mnist_mlp.main(with_workdir(workdir), cli_runs.images())
    return workdir


@pytest.fixture
def workdir(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_one_before_is_used_and_the_result_is_the_same(
    workdir, uninterrupted, capsys
):
    truncate(largest_file(workdir, step=12))
    mnist_mlp.main(with_workdir(workdir, resume=True), cli_runs.images())
    err = capsys.readouterr().err
    assert "checkpoint 12 is damaged" in err
    assert "continuing from checkpoint 8" in err
    assert_same(workdir, uninterrupted)
    kept = {path.name for path in (workdir / "mixed_float16").iterdir()}
    assert "damaged-checkpoint-12" in kept
    steps = {path.name for path in (workdir / "mixed_float16/checkpoints").iterdir()}
    assert {"12", "16", "20"} <= steps


def test_a_missing_checkpoint_and_a_cut_line_of_metrics_do_no_harm(
    workdir, uninterrupted
):
    shutil.rmtree(workdir / "mixed_float16/checkpoints/12")
    metrics = workdir / "mixed_float16/metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    mnist_mlp.main(with_workdir(workdir, resume=True), cli_runs.images())
    assert_same(workdir, uninterrupted)


def test_without_metrics_the_training_is_not_lost(workdir, uninterrupted):
    (workdir / "mixed_float16/metrics.jsonl").unlink()
    mnist_mlp.main(with_workdir(workdir, resume=True), cli_runs.images())
    ours, theirs = map(cli_runs.result_without_times, (workdir, uninterrupted))
    assert ours == theirs


def test_all_damaged_is_an_error_each_time_and_nothing_is_moved(
    workdir, monkeypatch, capsys
):
    for step in (4, 8, 12):
        flip(largest_file(workdir, step=step))
    before = files(workdir)
    config = with_workdir(workdir, resume=True)
    with pytest.raises(CheckpointError, match="steps 12, 8, 4"):
        mnist_mlp.main(config, cli_runs.images())
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as exit_info:
        cli.run(
            lambda _: mnist_mlp.main(config, cli_runs.images()),
            mnist_mlp.Config,
            doc=None,
        )
    assert exit_info.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("error: every checkpoint in")
    assert "\n\n" not in err
    assert files(workdir) == before


def test_a_finished_run_is_reported_and_not_touched(uninterrupted, monkeypatch, capsys):
    before = files(uninterrupted)
    monkeypatch.setattr(mnist_mlp, "train_policy", None)
    result = mnist_mlp.main(with_workdir(uninterrupted, resume=True), cli_runs.images())
    assert result.to_json() == read_json(uninterrupted / "result.json")
    assert f"{result.runs[0]['test_accuracy']:.4f}" in capsys.readouterr().out
    assert files(uninterrupted) == before


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_whichever_file_is_damaged_the_state_is_right(damage, tmp_path):
    original = tmp_path / "original"
    save(original / "checkpoints", steps=(1, 2))
    for index, file in enumerate(sorted(original.glob("checkpoints/2/**/*"))):
        if not file.is_file() or not file.stat().st_size:
            continue
        copy = shutil.copytree(original, tmp_path / str(index))
        damage(copy / file.relative_to(original))
        step, state, data_state = restore(copy / "checkpoints")
        assert (step, data_state) == (1, {"position": 1}), file
        np.testing.assert_array_equal(state["w"], array(1))


def test_a_second_damaged_checkpoint_of_a_step_gets_a_name_of_its_own(tmp_path, capsys):
    directory = tmp_path / "checkpoints"
    for _ in range(2):
        save(directory, steps=(1, 2))
        flip(largest_file(directory, step=2))
        assert restore(directory)[0] == 1
    assert (tmp_path / "damaged-checkpoint-2-2").is_dir()
    assert capsys.readouterr().err.count("checkpoint 2 is damaged") == 2


def test_a_checkpoint_of_an_older_version_is_refused_and_stays(tmp_path):
    directory = tmp_path / "checkpoints"
    save(directory, steps=(1,))
    (meta,) = directory.glob("1/meta/metadata")
    arrays = {"w": np.asarray(array(1))}
    meta.write_text(json.dumps({"sha256": checkpoints.digest(arrays)}))
    (tmp_path / "checkpoints.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"1 in .* is of an older version"):
            restore(directory)


def test_a_checkpoint_of_the_last_version_is_read(tmp_path):
    """Its checksum was that of all bytes."""
    directory = tmp_path / "checkpoints"
    save(directory, steps=(1,))
    (meta,) = directory.glob("1/meta/metadata")
    contents = json.loads(meta.read_text())
    data_state = json.dumps(contents["data_state"], sort_keys=True).encode()
    arrays = {"w": np.asarray(array(1))}
    arrays["data_state"] = np.frombuffer(data_state, np.uint8)
    sha256 = checkpoints.digest(arrays)
    meta.write_text(json.dumps({**contents, "sha256": sha256, "digest": None}))
    (tmp_path / "checkpoints.json").unlink()
    with pytest.raises(CheckpointError, match="older version"):
        restore(directory)
    contents = {"data_state": contents["data_state"], "sha256": sha256}
    meta.write_text(json.dumps(contents))
    assert restore(directory)[0] == 1


def test_a_file_that_cannot_be_read_is_damaged(tmp_path, monkeypatch, capsys):
    directory = tmp_path / "checkpoints"
    save(directory, steps=(1, 2))
    checksums = checkpoints._file_checksums

    def fail(path):
        if path.name == "2":
            raise OSError(5, "Input/output error")
        return checksums(path)

    monkeypatch.setattr(checkpoints, "_file_checksums", fail)
    assert restore(directory)[0] == 1
    assert "Input/output error" in capsys.readouterr().err


def array(step):
    return jnp.sin(jnp.arange(5000.0) + step)


def save(directory, *, steps):
    kept = Checkpoints(directory, keep=2)
    for step in steps:
        kept.save(step, {"w": array(step)}, {"position": step})
    kept.close()


def restore(directory):
    kept = Checkpoints(directory, keep=2)
    try:
        return kept.restore({"w": jnp.zeros(5000)})
    finally:
        kept.close()


def with_workdir(workdir, **changes):
    return dataclasses.replace(CONFIG, workdir=workdir, **changes)


def largest_file(directory, *, step):
    (checkpoint,) = (p for p in directory.rglob(str(step)) if p.is_dir())
    found = [p for p in checkpoint.rglob("d/*") if p.is_file()]
    return max(found, key=lambda path: path.stat().st_size)


def files(directory):
    """Returns every file with its content, except the plot."""
    return {
        path: path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".png"
    }


def assert_same(workdir, expected):
    ours, theirs = (
        cli_runs.rows_without_times(directory / "mixed_float16")
        for directory in (workdir, expected)
    )
    assert ours == theirs
    ours, theirs = map(cli_runs.result_without_times, (workdir, expected))
    assert ours == theirs
    assert theirs[0]["num_steps"] == STEPS_PER_EPOCH * CONFIG.num_epochs
