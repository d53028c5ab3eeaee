"""A run that is killed or stopped, and resumed, gives the uninterrupted result."""

import random
import shlex
import signal
import subprocess
import time

import numpy as np
import pytest
from helpers import cli_runs

import mpjax
from experiments import mnist_mlp

NUM_EPOCHS = 16
POLICIES = ("float32", "mixed_float16")
FLAGS = ("--dataset", "digits", "--num-units", 24, "--batch-size", 100)
FLAGS = (*FLAGS, "--num-epochs", NUM_EPOCHS)
SEED = 7


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, _, err = cli_runs.run(*FLAGS, "--workdir", workdir)
    assert code == 0, err
    return workdir


@pytest.mark.weekly
def test_killed_three_times_it_ends_bitwise_the_same(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    rng = random.Random(SEED)
    flags = (*FLAGS, "--workdir", workdir)
    for place in ("between", "in a checkpoint", "between"):
        epochs, pause_s = rng.randint(2, 9), rng.uniform(0, 0.1)
        print(f"killed after {epochs} epochs and {pause_s:.3f} s, {place}")
        with cli_runs.start(*flags) as process:
            wait_for_epochs(process, epochs)
            if place == "between":
                time.sleep(pause_s)
            else:
                stop_while_saving(process, workdir)
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        flags = (*FLAGS, "--workdir", workdir, "--resume")
    assert not (workdir / "result.json").exists()
    code, out, err = cli_runs.run(*flags)
    assert (code, "damaged" in err) == (0, False), err
    assert out.count("epoch ") < 2 * NUM_EPOCHS
    assert_same(workdir, uninterrupted)


@pytest.mark.weekly
def test_stopped_by_signals_it_prints_the_command_that_goes_on(uninterrupted, tmp_path):
    workdir = tmp_path / "a run's directory"
    line = shlex.join(cli_runs.command(*FLAGS, "--workdir", workdir))
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with shell(line) as process:
            wait_for_epochs(process, 10)
            process.send_signal(number)
            _, err = process.communicate(timeout=100)
        assert process.returncode == code, err
        message, line = err.rstrip().rsplit("\n", 1)
        assert message.startswith(f"error: stopped by {number.name}; saved after step")
        assert line.count("--workdir") == line.count("--resume") == 1
    with shell(line.strip()) as process:
        _, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
    assert_same(workdir, uninterrupted)


@pytest.mark.slow
def test_the_second_ctrl_c_stops_at_once(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\n"
        "from experiments import mnist_mlp\n"
        "from experiments.harness import cli, loop\n"
        "def evaluate(*args):\n"
        "    print('epoch', flush=True)\n"
        "    time.sleep(300)\n"
        "loop.evaluate = evaluate\n"
        "cli.run(mnist_mlp.main, mnist_mlp.Config, doc=None)\n"
    )
    flags = (*FLAGS, "--workdir", tmp_path / "run")
    with cli_runs.start(*flags, script=script) as process:
        wait_for_epochs(process, 1)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("error: stopped at once")
    assert "Traceback" not in err


def wait_for_epochs(process, count):
    """Reads stdout until `count` lines begin with "epoch"."""
    for line in process.stdout:
        count -= line.startswith("epoch")
        if not count:
            return
    raise AssertionError(f"it ended too early: {process.stderr.read()}")


def stop_while_saving(process, workdir):
    """Halts the process at a moment when a checkpoint is half on disk."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(workdir.glob("*/checkpoints/*tmp*")):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            if any(workdir.glob("*/checkpoints/*tmp*")):
                return
            process.send_signal(signal.SIGCONT)
    raise AssertionError("no checkpoint was seen while it was being written")


def shell(line):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        f"exec {line}",
        shell=True,
        stdout=pipe,
        stderr=pipe,
        text=True,
        cwd=cli_runs.ROOT,
        env=cli_runs.environment(),
    )


def assert_same(workdir, expected):
    """Asserts that metrics, results and final states are bitwise equal."""
    ours, theirs = map(cli_runs.result_without_times, (workdir, expected))
    assert ours == theirs
    for policy in POLICIES:
        ours, theirs = (
            cli_runs.rows_without_times(directory / policy)
            for directory in (workdir, expected)
        )
        assert ours == theirs
        ours, theirs = (
            cli_runs.newest_checkpoint(directory / policy, template(policy))
            for directory in (workdir, expected)
        )
        assert ours[0] == theirs[0] == NUM_EPOCHS * 12
        assert ours[1].keys() == theirs[1].keys()
        for name, value in ours[1].items():
            np.testing.assert_array_equal(value, theirs[1][name], err_msg=name)


def template(policy):
    config = mnist_mlp.Config(dataset="digits", num_units=24)
    splits = mnist_mlp.make_splits(config, config.load_dataset())
    task = mnist_mlp.make_task(config, policy, splits)
    tx = mpjax.with_loss_scale(task.tx, config.make_loss_scale(policy))
    return task.make_state(tx, policy, seed=0)
