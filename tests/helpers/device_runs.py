"""Short runs of three experiments: on one device, on a mesh, in two processes.

    python tests/helpers/device_runs.py INDEX PORT CASES

runs cases, in JSON, in one of two processes; tests/experiments/test_run_processes.py
starts both.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import cli_runs, detection_runs, speech_runs

from experiments import mnist_mlp, speech_ctc, ssd_digits
from experiments.data.mnist import ImageDataset
from experiments.harness import processes
from experiments.harness.recorder import read_rows

TIMEOUT_S = 300
ROOT = Path(__file__).parents[2]
DIVERGES = {"learning_rate": 1e30, "max_consecutive_skipped": 3}
NAMES = ("mnist_mlp", "speech_ctc", "ssd_digits")


def images():
    """300 images of a digit's brightness; the last batch of an epoch has padding."""
    rng = np.random.default_rng(0)

    def some(size):
        y = rng.integers(0, 10, size).astype(np.uint8)
        x = rng.integers(0, 20, (size, 28, 28)) + 20 * y[:, None, None]
        return x.astype(np.uint8), y

    return ImageDataset("shades", "the tests", *some(300), *some(40))


def config(name, workdir, policy, **changes):
    """Returns a short run's settings."""
    changes = {"workdir": Path(workdir), "policies": policy, **changes}
    if name == "mnist_mlp":
        settings = {"num_units": 32, "batch_size": 64, "num_epochs": 2}
        return mnist_mlp.Config(**(settings | changes))
    if name == "speech_ctc":
        settings = {"num_epochs": 1, "num_microbatches": 2, "batch_size": 16}
        return speech_runs.config(**(settings | changes))
    return detection_runs.settings(**({"batch_size": 8, "num_epochs": 4} | changes))


def run(name, settings):
    """Runs an experiment on its small data, without pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist_mlp, "report", lambda *_: None)
        if name == "mnist_mlp":
            return mnist_mlp.main(settings, images())
        if name == "speech_ctc":
            with speech_runs.without_pictures():
                return speech_ctc.main(settings, speech_runs.corpus())
        with detection_runs.tiny_network(), detection_runs.without_pictures():
            return ssd_digits.main(settings, detection_runs.dataset())


def weights(directory):
    """Returns the parameters of a run's newest checkpoint, by name, in float64."""
    arrays = cli_runs.arrays(Path(directory))
    return {k: np.float64(x) for k, x in arrays.items() if k.startswith("params")}


def numerics_rows(directory):
    """Returns counts of exponents by step, operation and slot."""
    rows = read_rows(Path(directory) / "metrics.jsonl")
    return {
        (row["step"], name, slot): histogram["counts"]
        for row in rows
        if row["kind"] == "numerics"
        for name, slots in row["operations"].items()
        for slot, histogram in slots.items()
    }


def distance(found, expected):
    """Returns the norm of a difference of parameters by that of the expected ones."""
    squares = lambda x: sum(np.sum(value**2) for value in x.values())
    difference = {name: found[name] - x for name, x in expected.items()}
    return math.sqrt(squares(difference) / squares(expected))


@contextlib.contextmanager
def two_processes(
    command, indices=(0, 1), variables=lambda index: {}, directory=lambda index: ROOT
):
    """Starts two processes of two CPU devices each, and kills them at the end.

    Args:
      command: `(index, port) -> arguments of Python`.
      indices: those that are started.
      variables: `index -> further environment variables`.
      directory: `index -> working directory`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command(index, port))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, **variables(index)},
            cwd=directory(index),
        )
        for index in indices
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def run_apart(cases):
    """Runs cases in a process of eight devices, which send messages in order."""
    command = lambda index, port: (__file__, index, 0, json.dumps(cases))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    with two_processes(command, (0,), lambda index: flags) as (apart,):
        output, _ = apart.communicate(timeout=TIMEOUT_S)
    assert apart.returncode == 0, output


def main(index, port, cases):
    """Runs cases, each the name of an experiment and its settings as JSON values.

    Args:
      index: of the process.
      port: of the first one; 0 where there is no other.
      cases: pairs of a name and of settings.
    """
    processes.order_messages()
    cluster = {
        "distributed": True,
        "coordinator": f"127.0.0.1:{port}",
        "num_processes": 2,
        "process_index": index,
    }
    cluster = cluster if port else {}
    for name, changes in cases:
        settings = config(name, changes.pop("workdir"), **changes, **cluster)
        processes.start(settings)
        run(name, settings)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
