"""The output and the files of a run; its loop never waits for the device."""

import dataclasses
import fcntl
import json
import os
import pty
import struct
import subprocess
import termios
import threading

import jax
import numpy as np
import pytest
from helpers import cli_runs
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments import mnist_mlp
from experiments.harness import loop, results
from experiments.harness.config import BaseConfig, split_policies
from experiments.harness.recorder import Recorder, read_rows, weighted_mean

NUM_EPOCHS = 3
STEPS_PER_EPOCH = 4
POLICIES = ("float32", "p=f32,c=f16,o=f32")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return mnist_mlp.Config(
        policies=",".join(POLICIES),
        num_units=8,
        batch_size=30,
        num_epochs=NUM_EPOCHS,
        workdir=tmp_path_factory.mktemp("harness") / "run",
    )


@pytest.fixture(scope="module")
def finished(config):
    """A comparison; a guard forbids copies to the host and back while it trains."""
    step = jax.jit(lambda x: x + 1)
    with pytest.raises(Exception, match="Disallowed"), jax.transfer_guard("disallow"):
        step(np.ones(3))  # so the guard works here
    original, evaluate = loop._Loop._steps, loop.evaluate

    def guarded(*args):
        with jax.transfer_guard("disallow"):
            return original(*args)

    def unguarded(*args):
        with jax.transfer_guard("allow"):
            return evaluate(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "_steps", guarded)
        patch.setattr(loop, "evaluate", unguarded)
        return mnist_mlp.main(config, cli_runs.images())


def test_every_file_is_there(finished):
    names = {p.name for p in finished.workdir.iterdir() if not p.name.startswith(".")}
    assert names == {
        "config.json",
        "result.json",
        "result.md",
        "training.png",
        *POLICIES,
    }
    for policy in POLICIES:
        names = {path.name for path in (finished.workdir / policy).iterdir()}
        assert names == {
            "checkpoints",
            "checkpoints.json",
            "metrics.jsonl",
            "result.json",
            "tensorboard",
        }
        steps = {p.name for p in (finished.workdir / policy / "checkpoints").iterdir()}
        assert steps == {"8", "12"}
    assert (finished.workdir / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.workdir.rglob(".*.json*"))


def test_result_json_says_what_and_where(finished, config):
    result = json.loads((finished.workdir / "result.json").read_text())
    assert result["config"] == config.comparable()
    assert result["runs"] == finished.runs
    where = result["environment"]
    assert where["device"]
    assert where["float32_matmul_precision"] == "default"
    assert where["command"].startswith("python ")
    assert where["versions"]["jax"] == jax.__version__
    assert {"commit", "python", "num_devices"} <= where.keys()
    described = json.loads((finished.workdir / "config.json").read_text())
    assert described == {"experiment": "mnist_mlp", **result["config"]}
    assert [run["loss_scale"] for run in finished.runs] == ["none", "dynamic"]


@pytest.mark.parametrize("policy", POLICIES)
def test_metrics_events_and_result_agree(finished, policy):
    directory = finished.workdir / policy
    rows = read_rows(directory / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [r["step"] for r in train] == list(range(1, NUM_EPOCHS * 4 + 1))
    assert [(r["epoch"], r["step"]) for r in epochs] == [(1, 4), (2, 8), (3, 12)]
    assert [r["num_examples"] for r in train] == [30, 30, 30, 6] * NUM_EPOCHS
    first = train[:STEPS_PER_EPOCH]
    mean = sum(r["loss"] * r["num_examples"] for r in first) / 96
    np.testing.assert_allclose(epochs[0]["loss"], mean, rtol=1e-12)
    run = finished.run(policy)
    assert run["val_loss"] == epochs[-1]["val_loss"]
    assert run["ms_per_step"] in [r["ms_per_step"] for r in epochs]
    assert run["final_loss_scale"] == (1 if policy == "float32" else 2**15)
    expected = {
        (f"{row['kind']}/{name}", row["step"]): np.float32(value)
        for row in rows
        for name, value in row.items()
        if name not in ("kind", "step")
    }
    assert read_events(directory / "tensorboard") == expected


def test_a_resumed_run_with_more_epochs_is_the_longer_run(
    finished, config, tmp_path, capsys
):
    workdir, policy = tmp_path / "run", "p=f32,c=f16,o=f32"
    config = dataclasses.replace(config, policies=policy, workdir=workdir)
    shorter = dataclasses.replace(config, num_epochs=1)
    mnist_mlp.main(shorter, cli_runs.images())
    capsys.readouterr()
    longer = dataclasses.replace(config, resume=True)
    mnist_mlp.main(longer, cli_runs.images())
    out = capsys.readouterr().out
    assert "num_epochs grows from 1 to 3" in out
    assert f"{policy}: resumed after step 4 of 12\n" in out
    ours, theirs = (
        (cli_runs.rows_without_times(directory), cli_runs.arrays(directory))
        for directory in (workdir / policy, finished.workdir / policy)
    )
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    for name, value in ours[1].items():
        np.testing.assert_array_equal(value, theirs[1][name], err_msg=name)
    (run,) = cli_runs.result_without_times(workdir)
    assert run in cli_runs.result_without_times(finished.workdir)


def test_the_table_has_every_policy(finished):
    text = (finished.workdir / "result.md").read_text()
    for run in finished.runs:
        assert f"| {run['policy']} | {run['loss_scale']} |" in text
        assert f"{run['test_accuracy']:.4f}" in text


def test_ms_per_step_leaves_compilation_out(finished):
    run = finished.run("float32")
    first = read_rows(finished.workdir / "float32/metrics.jsonl")[STEPS_PER_EPOCH]
    assert first["kind"] == "epoch"
    assert first["ms_per_step"] * STEPS_PER_EPOCH < 1000 * run["compile_s"]


@pytest.mark.weekly
def test_on_a_pipe_there_is_no_bar_and_no_control_character(tmp_path):
    flags = ("--dataset", "digits", "--num-units", "4", "--num_epochs", "2")
    flags = (*flags, "--batch-size", "300", "--policy", "mixed_float16")
    code, out, err = cli_runs.run(*flags, "--workdir", tmp_path / "run")
    assert (code, err) == (0, "")
    assert all(c.isprintable() or c == "\n" for c in out)
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all("ms/step" in line and "scale 32768" in line for line in lines)
    command = json.loads((tmp_path / "run/result.json").read_text())["environment"]
    assert command["command"].startswith("python -m experiments.mnist_mlp --dataset")


@pytest.mark.weekly
def test_on_a_terminal_the_bar_shows_loss_scale_and_skips(tmp_path):
    flags = ("--dataset", "digits", "--num-units", "4", "--num_epochs", "60")
    flags = (*flags, "--policy", "mixed_float16", "--batch-size", "20")
    flags = (*flags, "--num-checkpoints", 0, "--workdir", tmp_path / "run")
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        cli_runs.command(*flags),
        stdout=other,
        stderr=other,
        cwd=cli_runs.ROOT,
        env=cli_runs.environment() | {"TERM": "xterm"},
    )
    os.close(other)
    text = read_all(main)
    assert process.wait(timeout=60) == 0
    bars = [part for part in text.split("\r") if "skipped=" in part]
    assert any("loss=" in bar and "scale=32768" in bar for bar in bars), text
    assert any("mixed_float16:" in bar and "step/s" in bar for bar in bars)
    assert text.count("epoch") >= 60


def test_rows_of_a_resumed_run_replace_those_it_writes_again(tmp_path):
    recorder = Recorder(tmp_path)
    for step in range(1, 6):
        recorder.write("train", step, {"loss": np.float32(step)})
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    recorder = Recorder(tmp_path, first_step=3)
    recorder.write("train", 4, {"loss": np.float32(40), "finite": np.True_})
    recorder.close()
    losses = [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert losses == [1, 2, 3, 40]
    events = read_events(tmp_path / "tensorboard")
    assert [v for (name, _), v in events.items() if name == "train/loss"] == losses
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_means_leave_skipped_steps_out():
    rows = [
        {"loss": 1.0, "num_examples": 10},
        {"loss": float("nan"), "num_examples": 10},
        {"loss": 4.0, "num_examples": 20},
    ]
    assert weighted_mean(rows, "loss") == 3
    assert np.isnan(weighted_mean(rows[1:2], "loss"))


def test_policies_are_split_outside_jmp_strings():
    assert split_policies("float32, p=f32,c=f16,o=f32,p=f32,c=bf16 ,bfloat16") == [
        "float32",
        "p=f32,c=f16,o=f32",
        "p=f32,c=bf16",
        "bfloat16",
    ]
    config = BaseConfig(policies="float32,float32,,mixed_float16")
    assert config.policy_names() == ("float32", "mixed_float16")


def read_all(descriptor):
    parts = []
    timer = threading.Timer(120, os.close, [descriptor])
    timer.start()
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        parts.append(part)
    timer.cancel()
    return b"".join(parts).decode(errors="replace")


def read_events(directory):
    """What TensorBoard shows: a start drops earlier events of that step and later."""
    shown = {}
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.session_log.status == SessionLog.START:
                shown = {k: v for k, v in shown.items() if k[1] < event.step}
            for value in event.summary.value:
                shown[value.tag, event.step] = np.float32(value.simple_value)
    return shown


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("sse2 avx2 avx512f avx512_bf16", "cpu_avx512_bf16"),
        ("sse2 avx2", "cpu_avx2"),
        ("sse2", "cpu"),
    ],
)
def test_results_of_cpus_that_differ_have_other_names(monkeypatch, flags, name):
    info = {"flags": [flags, flags], "model name": ["EPYC", "EPYC"]}
    monkeypatch.setattr(results, "_cpu_info", info.get)
    assert results.machine() == name
    assert results.environment()["device"].startswith("EPYC (2 threads")


def test_a_table_that_is_too_wide_for_the_terminal_is_turned(monkeypatch, capsys):
    columns = [results.Column(f"heading {i}", f"key_{i}") for i in range(8)]
    runs = [{c.key: f"value {i}" for c in columns} for i in range(2)]
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = {}
    for width in (60, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        results.print_table("title", columns, runs)
        lines[width] = capsys.readouterr().out.splitlines()
    assert len(lines[60]) == len(lines[160]) + len(columns) - len(runs) - 1
    assert all("\N{HORIZONTAL ELLIPSIS}" not in line for line in lines[60])
    assert any(
        "heading 7" in x and "value 0" in x and "value 1" in x for x in lines[60]
    )
