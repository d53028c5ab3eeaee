"""Two processes of two devices on loopback train like one process of four."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import two_processes

from mpjax import sharding

SCRIPT = Path(two_processes.__file__)
TIMEOUT_S = 600


def run_both(case):
    """Returns what the two processes print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    runs = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(index), str(port), case],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"JAX_PLATFORMS": "cpu"},
        )
        for index in (0, 1)
    ]
    try:
        outputs = [run.communicate(timeout=TIMEOUT_S) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    for run, (_, errors) in zip(runs, outputs, strict=True):
        assert run.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.skipif(
    jax.device_count() < 4, reason="needs four devices; conftest makes them on a CPU"
)
@pytest.mark.parametrize(
    "case",
    [
        "plain",
        pytest.param("rich", marks=pytest.mark.slow),
        pytest.param("tensor", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_like_one(case):
    """By their own examples and by whole batches; one overflow skips both.

    Processes may add up in another order than the devices of one.
    """
    both = run_both(case)
    mesh, _, state, step = two_processes.start(case)
    state, rows, _ = two_processes.train(
        state, step, lambda batch: sharding.shard_batch(batch, mesh)
    )
    num_parts, num_own = (2, 2) if case == "tensor" else (4, 2)
    for index, result in enumerate(both):
        assert result["rows"] == rows
        assert [row[1] for row in rows] == [True, True, False, True]
        assert rows[3][0] == rows[2][0] / 2
        assert not result["moved"]
        assert result["same"]
        assert result["params"] == both[0]["params"]
        for path, x in result["params"].items():
            expected = np.asarray(state.params[path])
            np.testing.assert_allclose(np.float32(x), expected, rtol=1e-5, atol=1e-7)
        where = f"into {num_parts} parts, {num_own} of them in process {index}"
        assert "w differs between process 0 and process 1" in result["unequal"]
        assert where in result["odd"]
        assert "batch/x must have a multiple of 2 examples" in result["odd"]
        assert "got shape (3, 4)" in result["odd"]
        assert f"must have {16 * num_own // num_parts} examples" in result["short"]
        assert "none of process 1" in result["half a mesh"]
