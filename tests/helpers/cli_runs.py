"""Starts experiments as a person does, and reads their output."""

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from experiments.data.mnist import ImageDataset
from experiments.harness.checkpoints import Checkpoints, to_arrays
from experiments.harness.recorder import read_rows

ROOT = Path(__file__).parents[2]
# What differs between two runs of the same settings.
TIMES = ("ms_per_step", "compile_s")


def command(*flags, module="experiments.mnist_mlp", script=None):
    program = ["-m", module] if script is None else [str(script)]
    return [sys.executable, *program, *map(str, flags)]


# Every process compiles the same programs; the second one finds them here.
COMPILED = tempfile.mkdtemp(prefix="mpjax-tests-")
atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)


@contextlib.contextmanager
def compiled_once():
    """Keeps compiled programs on disk, where further runs find them."""
    names = {
        "jax_compilation_cache_dir": COMPILED,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def environment(*, cached=True):
    """Returns an environment without XLA flags: one device, as most people have."""
    left_out = {"XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    kept |= {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "JAX_PLATFORMS": "cpu"}
    if not cached:
        return kept
    return kept | {
        "JAX_COMPILATION_CACHE_DIR": COMPILED,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(*flags, cached=True, **kwargs):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(*flags, **kwargs),
        stdout=pipe,
        stderr=pipe,
        text=True,
        cwd=ROOT,
        env=environment(cached=cached),
    )


def run(*flags, **kwargs):
    """Runs to the end; returns exit code, stdout and stderr."""
    with start(*flags, **kwargs) as process:
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def images(num=120, num_test=40, seed=0):
    """Returns small pictures whose label is the index of a bright column."""
    rng = np.random.default_rng(seed)

    def some(size):
        y = rng.integers(0, 10, size).astype(np.uint8)
        x = rng.integers(0, 60, (size, 4, 10)).astype(np.uint8)
        x[np.arange(size), :, y] += 150
        return x, y

    return ImageDataset("columns", "the tests", *some(num), *some(num_test))


def rows_without_times(directory):
    """Returns the rows of metrics without measured times."""
    rows = read_rows(directory / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def result_without_times(workdir):
    result = json.loads((workdir / "result.json").read_text())
    return [{k: v for k, v in run.items() if k not in TIMES} for run in result["runs"]]


def arrays(directory):
    """Returns the arrays of the newest checkpoint, by name, whatever they are."""
    checkpoints = Checkpoints(directory / "checkpoints", keep=1, read_only=True)
    try:
        return checkpoints.restore(None).state
    finally:
        checkpoints.close()


def newest_checkpoint(directory, template):
    """Returns the step and the arrays of the newest checkpoint."""
    checkpoints = Checkpoints(directory / "checkpoints", keep=2)
    try:
        step, state, _ = checkpoints.restore(template)
    finally:
        checkpoints.close()
    return step, {k: np.asarray(v) for k, v in to_arrays(state).items()}
