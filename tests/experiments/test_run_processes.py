"""Runs in two processes on loopback: the result of one, and what is lost with one."""

import json
import os
import signal
import time

import jax
import pytest
from helpers import device_runs

TIMEOUT_S = device_runs.TIMEOUT_S
LOST_S = 120  # until the others end, after one process was killed
LONG = "experiments.mnist_mlp --dataset digits --num-units 32 --batch-size 64 "
LONG += "--num-epochs 100000 --policy float32"

needs_devices = pytest.mark.skipif(
    jax.device_count() < 4, reason="needs four devices; conftest makes them on a CPU"
)


def run_cases(*cases):
    """Runs cases in two processes, and returns their output."""
    text = json.dumps(cases)
    command = lambda index, port: (device_runs.__file__, index, port, text)
    with device_runs.two_processes(command) as started:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    return [process.returncode for process in started], outputs


def long_run(workdir, *more):
    """Returns the command of a run that does not end by itself."""
    flags = [*LONG.split(), "--workdir", workdir, *more]

    def command(index, port):
        cluster = ["--distributed", "--coordinator", f"127.0.0.1:{port}"]
        cluster += ["--num-processes", "2", "--process-index", index]
        return ["-m", *flags, *cluster]

    return command


def wait_for_checkpoint(workdir, started):
    checkpoints = workdir / "float32" / "checkpoints.json"
    deadline = time.monotonic() + TIMEOUT_S
    while not checkpoints.exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started), [
            process.communicate()[0] for process in started
        ]
        time.sleep(0.1)


@needs_devices
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param("mnist_mlp", None, marks=pytest.mark.slow),
        pytest.param("speech_ctc", "data=2,fsdp=2", marks=pytest.mark.weekly),
        pytest.param("ssd_digits", "fsdp=4", marks=pytest.mark.weekly),
    ],
)
def test_two_processes_train_like_one(tmp_path, name, mesh):
    """Each reads its part of the batches; the first one writes what all need."""
    policies = ("float32", "mixed_float16")
    cases = [
        (name, {"workdir": str(tmp_path / p), "policy": p, "mesh": mesh})
        for p in policies
    ]
    codes, outputs = run_cases(*cases)
    assert codes == [0, 0], outputs
    expected = {}
    for policy in policies:
        alone = tmp_path / f"{policy} alone"
        device_runs.run(name, device_runs.config(name, alone, policy))
        expected[policy] = device_runs.weights(alone / policy)
        found = device_runs.weights(tmp_path / policy / policy)
        limit = 1e-6
        if policy == "mixed_float16":
            limit = device_runs.distance(expected[policy], expected["float32"])
        assert device_runs.distance(found, expected[policy]) < limit
        files = sorted(path.name for path in (tmp_path / policy).iterdir())
        assert files == sorted(path.name for path in alone.iterdir())
    if name == "mnist_mlp":
        longer = {"num_epochs": 3, "resume": True}
        for workdir in (tmp_path / "float32", tmp_path / "float32 alone"):
            settings = device_runs.config(name, workdir, "float32", **longer)
            device_runs.run(name, settings)
        found, one = (
            device_runs.weights(tmp_path / workdir / "float32")
            for workdir in ("float32", "float32 alone")
        )
        assert device_runs.distance(found, one) < 1e-6


@pytest.mark.weekly
def test_two_processes_name_the_same_overflow(tmp_path):
    changes = {"workdir": str(tmp_path), "policy": "float32", **device_runs.DIVERGES}
    codes, outputs = run_cases(("mnist_mlp", changes))
    assert 0 not in codes
    for output in outputs:
        assert "NonFiniteTrainingError" in output
        assert "overflow" in output


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(tmp_path):
    """Both save the same step, from which one process alone goes on."""
    with device_runs.two_processes(long_run(tmp_path)) as started:
        wait_for_checkpoint(tmp_path, started)
        started[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    assert [process.returncode for process in started] == [128 + signal.SIGTERM] * 2
    assert "stopped by SIGTERM; saved after step" in outputs[0]
    assert "error" not in outputs[1]
    directory = tmp_path / "float32" / "checkpoints"
    newest = max(int(path.name) for path in directory.iterdir())
    assert f"saved after step {newest}." in outputs[0]


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param(0, marks=pytest.mark.weekly),
        pytest.param(1, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_killed_ends_the_other(tmp_path, killed):
    """The other one says what it lost, and what to do."""
    with device_runs.two_processes(long_run(tmp_path)) as started:
        wait_for_checkpoint(tmp_path, started)
        started[killed].kill()
        output, _ = started[1 - killed].communicate(timeout=LOST_S)
    assert started[1 - killed].returncode not in (0, None)
    assert "Gloo" in output or "JAX distributed service" in output
    found, flags = False, [*LONG.split(), "--workdir", tmp_path, "--resume"]
    with device_runs.two_processes(lambda *_: ["-m", *flags], indices=(0,)) as (alone,):
        for line in alone.stdout:
            if "epoch" in line:
                break
            found = "resumed after step" in line
        alone.send_signal(signal.SIGTERM)
        alone.communicate(timeout=TIMEOUT_S)
    assert found


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_waits_in_vain_says_so(tmp_path, index):
    command = long_run(tmp_path, "--start-timeout-s", 2)
    with device_runs.two_processes(command, indices=(index,)) as (alone,):
        output, _ = alone.communicate(timeout=60)
    assert alone.returncode == 2
    assert f"process {index} of 2 did not find the others" in output
    assert "--start-timeout-s" in output


@pytest.mark.weekly
def test_a_damaged_checkpoint_is_set_aside_by_all(tmp_path):
    """Also where its content is read before what is wrong shows."""
    workdir = tmp_path / "run"
    run = {"workdir": str(workdir), "policy": "float32", "mesh": "fsdp=4"}
    codes, outputs = run_cases(("mnist_mlp", run))
    assert codes == [0, 0], outputs
    directory = workdir / "float32" / "checkpoints"
    newest = max(directory.iterdir(), key=lambda path: int(path.name))
    files = [path for path in newest.rglob("d/*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    (directory.parent / "checkpoints.json").unlink()
    codes, outputs = run_cases(("mnist_mlp", {**run, "num_epochs": 3, "resume": True}))
    assert codes == [0, 0], outputs
    assert f"checkpoint {newest.name} is damaged" in outputs[0]
    assert "resumed after step" in outputs[0]


@pytest.mark.slow
def test_processes_of_other_flags_are_refused(tmp_path):
    command = lambda index, port: [
        *long_run(tmp_path)(index, port),
        *("--learning-rate", f"0.00{index + 1}"),
    ]
    with device_runs.two_processes(command) as started:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], outputs
    texts = [" ".join(output.split()) for output in outputs]
    assert all("process 1 differs from process 0" in text for text in texts)
    assert "learning_rate is 0.002 there and 0.001 in process 0" in texts[1]


@pytest.mark.slow
def test_a_mesh_of_unequal_processes_is_refused(tmp_path):
    with device_runs.two_processes(long_run(tmp_path, "--mesh", "data=3")) as started:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], outputs
    for output in outputs:
        assert "got 2 of process 0, 1 of process 1" in " ".join(output.split())


@pytest.mark.weekly
def test_what_slurm_says_is_enough(tmp_path):
    """By the variables that JAX reads, on one node."""

    def slurm(index):
        return {
            "SLURM_JOB_ID": str(os.getpid()),  # JAX takes the port from it
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
        }

    flags = [*LONG.split(), "--num-epochs", "1", "--workdir", tmp_path / "run"]
    command = lambda *_: ["-m", *flags, "--distributed"]
    with device_runs.two_processes(command, variables=slurm) as started:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert "data=4 of cpu in 2 processes" in outputs[0]


@pytest.mark.weekly
def test_a_directory_that_is_not_shared_is_refused(tmp_path):
    """A relative path means another directory in each process."""
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    with device_runs.two_processes(
        long_run("run"), directory=lambda index: tmp_path / str(index)
    ) as started:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    assert [process.returncode for process in started] == [1, 1], outputs
    for output in outputs:
        assert "process 1 does not see what process 0 writes" in output
