"""Times of a bidirectional GRU: this project's, Flax's and PyTorch's.

    python -m experiments.benchmarks.recurrence      # a minute on 2 CPU cores

Forward, and forward with the gradients of inputs and parameters, in float32, with as
many inputs as outputs, as in the second of several layers. Interleaved: one round times
everything once, in a shuffled order; ratios are medians over rounds of the ratio within
a round. Flax's is `nn.Bidirectional` of two `nn.RNN` of `nn.GRUCell`; PyTorch's, left
out where it is not installed, is `nn.GRU`. No sequence is padded; the first two would
mask padding all the same.
"""

from experiments.configs.recurrence import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.benchmarks.recurrence", Config, doc=__doc__)

import functools
import importlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks._timing import median_ratio, time_rounds
from experiments.harness import results
from experiments.harness.output import RESULTS, save_table
from experiments.harness.results import Column
from experiments.models.speech.recurrent import Recurrence

NAME = "recurrence"
OURS, FLAX, TORCH = "experiments.models.speech", "flax nn.RNN", "PyTorch nn.GRU"
COLUMNS = (
    Column("units", "num_units"),
    Column("implementation", "name"),
    Column("forward, ms", "forward_ms", "{:.1f}"),
    Column("times ours", "forward_ratio", "{:.2f}"),
    Column("with gradients, ms", "gradient_ms", "{:.1f}"),
    Column("times ours ", "gradient_ratio", "{:.2f}"),
)


def main(config: Config) -> dict[str, Any]:
    """Times every implementation at every size; writes the table.

    Returns:
      What the result file holds; its `runs` have the keys of `COLUMNS`.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    environment = results.environment((*results.PACKAGES, "torch"))
    left_out = {}
    if importlib.util.find_spec("torch") is None:
        left_out[TORCH] = "pip install torch"
    runs = []
    for num_units in config.num_units:
        shape = (config.batch_size, config.length, 2 * num_units)
        x = np.random.default_rng(config.seed).standard_normal(shape, np.float32)
        fns = {}
        for name, make in IMPLEMENTATIONS.items():
            if name not in left_out:
                forward, gradient = make(x, num_units)
                fns |= {(name, "forward"): forward, (name, "gradient"): gradient}
        for fn in fns.values():
            fn()  # compiles
        times_ms = time_rounds(fns, config.num_rounds, seed=config.seed)
        runs += _rows(num_units, times_ms)
    table = {
        "experiment": NAME,
        "length": config.length,
        "batch_size": config.batch_size,
        "num_rounds": config.num_rounds,
        "seed": config.seed,
        "environment": environment,
        "left_out": left_out,
        "runs": runs,
    }
    file = f"{NAME}_{environment['machine']}_jax{jax.__version__}.json"
    title = f"bidirectional GRU, {config.batch_size} sequences of {config.length}"
    save_table(config.output or RESULTS / file, table, title, COLUMNS)
    return table


def _rows(
    num_units: int, times_ms: dict[tuple[str, str], list[float]]
) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(name for name, _ in times_ms):
        row: dict[str, Any] = {"num_units": num_units, "name": name}
        for what in ("forward", "gradient"):
            times = times_ms[name, what]
            row[f"{what}_ms"] = statistics.median(times)
            row[f"{what}_ratio"] = median_ratio(times, times_ms[OURS, what])
            row[f"{what}_times_ms"] = [round(t, 3) for t in times]
        rows.append(row)
    return rows


def _ours(x: np.ndarray, num_units: int) -> tuple[Callable[[], Any], ...]:
    return _jax_fns(Recurrence(num_units), x)


def _flax(x: np.ndarray, num_units: int) -> tuple[Callable[[], Any], ...]:
    forward, backward = (nn.RNN(nn.GRUCell(num_units)) for _ in range(2))
    return _jax_fns(nn.Bidirectional(forward, backward), x)


def _jax_fns(module: nn.Module, x: np.ndarray) -> tuple[Callable[[], Any], ...]:
    """Returns functions that compute the outputs, and the gradients of their sum."""
    name = "num_frames" if isinstance(module, Recurrence) else "seq_lengths"
    lengths: dict[str, Any] = {name: jnp.full(x.shape[0], x.shape[1])}
    params = jax.jit(module.init)(jax.random.key(0), x, **lengths)
    apply: Any = lambda params, x: module.apply(params, x, **lengths)
    total = lambda params, x: jnp.sum(apply(params, x))
    fns = jax.jit(apply), jax.jit(jax.grad(total, argnums=(0, 1)))
    run = lambda fn: jax.block_until_ready(fn(params, x))
    return tuple(functools.partial(run, fn) for fn in fns)


def _torch(x: np.ndarray, num_units: int) -> tuple[Callable[[], Any], ...]:
    t: Any = importlib.import_module("torch")
    device = "cuda" if t.cuda.is_available() else "cpu"
    gru = t.nn.GRU(x.shape[-1], num_units, batch_first=True, bidirectional=True)
    gru = gru.to(device)
    inputs = t.from_numpy(x).to(device).requires_grad_()

    def wait():
        if device == "cuda":
            t.cuda.synchronize()

    def forward():
        with t.no_grad():
            gru(inputs)
        wait()

    def gradient():
        gru.zero_grad(set_to_none=True)
        inputs.grad = None
        gru(inputs)[0].sum().backward()
        wait()

    return forward, gradient


IMPLEMENTATIONS = {OURS: _ours, FLAX: _flax, TORCH: _torch}
