"""Where the time of a speech recognizer's training step goes, part by part.

    python -m experiments.benchmarks.speech_profile      # two minutes on 2 CPU cores

The recognizer of `speech_ctc` and one batch, in float32. The network is cut off after
each part in turn, and the gradients of the sum of what comes out are timed: the
difference between two cuts is what a part costs, forward and backward. Interleaved: one
round times every cut once, in a shuffled order; differences are taken within a round.
"""

from experiments.configs.speech_profile import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.benchmarks.speech_profile", Config, doc=__doc__)

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import mpjax
from experiments.benchmarks._timing import time_rounds
from experiments.benchmarks.workloads import speech
from experiments.harness import results
from experiments.harness.output import RESULTS, save_table
from experiments.harness.results import Column
from experiments.models.speech.model import SpeechModel

NAME = "speech_profile"
COLUMNS = (
    Column("part of the step", "name"),
    Column("ms, median", "ms", "{:.1f}"),
    Column("quartiles", "quartiles_ms", lambda q: f"{q[0]:.1f} to {q[1]:.1f}"),
    Column("share of the step", "share", lambda x: f"{round(100 * x)}%"),
)
# The module whose output ends each part, in the order of the network.
PARTS = {
    "first convolution": "conv_norm_1",
    "second convolution": "conv_norm_2",
    "first recurrent layer": "recurrent_1",
    "second recurrent layer": "recurrent_2",
}
LOSS, UPDATE, STEP = "output layer and CTC", "optimizer", "whole step"


def main(config: Config) -> dict[str, Any]:
    """Times every part; writes the table.

    Returns:
      What the result file holds; its `runs` have the keys of `COLUMNS`.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    environment = results.environment(results.PACKAGES)
    fns = _cuts(config)
    for fn in fns.values():
        fn()  # compiles
    times_ms = time_rounds(fns, config.num_rounds, seed=config.seed)
    table = {
        "experiment": NAME,
        "num_seconds": config.num_seconds,
        "batch_size": config.batch_size,
        "num_rounds": config.num_rounds,
        "seed": config.seed,
        "environment": environment,
        "runs": _rows(times_ms),
    }
    file = f"{NAME}_{environment['machine']}_jax{jax.__version__}.json"
    title = f"{config.batch_size} utterances of at most {config.num_seconds:g} s"
    save_table(config.output or RESULTS / file, table, title, COLUMNS)
    return table


def _cuts(config: Config) -> dict[str, Callable[[], Any]]:
    """Returns what times the network up to the end of each part, and the whole step."""
    workload = speech(config.num_seconds)
    model = SpeechModel(num_classes=27)
    params_key, batch_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(workload.init_params)(params_key)
    batch = jax.jit(workload.make_batch, static_argnums=1)(batch_key, config.batch_size)

    def total_until(module: str) -> Callable[..., jax.Array]:
        def total(params, batch):
            captured: Any = model.apply(
                {"params": params},
                batch["features"],
                batch["num_frames"],
                train=True,
                capture_intermediates=lambda m, _: m.name == module,
                mutable=["batch_stats", "intermediates"],
            )
            (outputs,) = captured[1]["intermediates"][module]["__call__"]
            return jnp.sum(outputs)

        return total

    def loss(params, batch):
        return workload.loss_fn(params, batch, jax.random.key(0))[0]

    tx = mpjax.with_loss_scale(workload.tx, mpjax.NoOpLossScale())
    step = mpjax.make_train_step(workload.loss_fn, tx, policy="float32", donate=False)
    train_state = mpjax.TrainState.create(params=params, tx=tx)
    gradients = {name: jax.jit(jax.grad(total_until(m))) for name, m in PARTS.items()}
    gradients[LOSS] = jax.jit(jax.grad(loss))
    run = lambda fn, *args: lambda: jax.block_until_ready(fn(*args))
    fns = {name: run(fn, params, batch) for name, fn in gradients.items()}
    return fns | {UPDATE: run(step, train_state, batch)}


def _rows(times_ms: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns a row per part, its time less that of the part before, and the whole."""
    whole = times_ms[UPDATE]
    before = [0.0] * len(whole)
    parts = {}
    for name, until in times_ms.items():
        parts[name] = [a - b for a, b in zip(until, before, strict=True)]
        before = until
    return [
        {
            "name": name,
            "ms": statistics.median(times),
            "quartiles_ms": statistics.quantiles(times, n=4)[::2],
            "share": statistics.median(times) / statistics.median(whole),
            "times_ms": [round(t, 3) for t in times],
        }
        for name, times in (parts | {STEP: whole}).items()
    ]
