"""What the train step costs: interleaved step times of the Keras-guide network.

    python -m experiments.benchmark                   # batch 2048, 4096 units; a CPU
    python -m experiments.benchmark --batch-size 8192 # a GPU

Every row trains the same network on the same batch. One round times each row once, in
a shuffled order, so that whatever else the machine does hits all alike; ratios are
medians over rounds of the ratio within a round.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm.auto import tqdm

import mpjax
from experiments.harness import cli, results
from experiments.harness.config import require_positive
from experiments.harness.loss_scales import parse_loss_scale
from experiments.harness.results import Column
from experiments.harness.workdir import write_json
from experiments.mnist_mlp import make_loss_fn, rmsprop
from experiments.models.mlp import MLP

NAME = "benchmark"
HAND_WRITTEN = "flax + optax by hand, float32"


class Row(NamedTuple):
    """One step to time, and the row that its time is divided by."""

    policy: str | None
    loss_scale: str
    reference: str
    autocast: bool = True


FLOAT16, BFLOAT16 = "mpjax mixed_float16", "mpjax mixed_bfloat16"
ROWS = {
    HAND_WRITTEN: Row(None, "none", HAND_WRITTEN),
    "mpjax float32": Row("float32", "none", HAND_WRITTEN),
    FLOAT16: Row("mixed_float16", "none", FLOAT16),
    f"{FLOAT16} + dynamic": Row("mixed_float16", "dynamic", FLOAT16),
    f"{FLOAT16}, no autocast": Row("mixed_float16", "none", FLOAT16, autocast=False),
    BFLOAT16: Row("mixed_bfloat16", "none", BFLOAT16),
    f"{BFLOAT16} + dynamic": Row("mixed_bfloat16", "dynamic", BFLOAT16),
    f"{BFLOAT16}, no autocast": Row("mixed_bfloat16", "none", BFLOAT16, autocast=False),
}
COLUMNS = (
    Column("row", "name"),
    Column("ms/step, median", "median_ms", "{:.1f}"),
    Column("quartiles", "quartiles_ms"),
    Column("ratio", "ratio", "{:.3f}"),
    Column("to", "reference"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to time."""

    num_units: int = 4096
    """Units in each of the two hidden layers."""

    batch_size: int = 2048
    """Examples per step."""

    num_rounds: int = 15
    """How often each row is timed."""

    seed: int = 0
    """Of parameters, data and order."""

    output: Path | None = None
    """The result file; a name in experiments/results by default."""

    def __post_init__(self):
        require_positive(self, "num_units", "batch_size", "num_rounds")


def main(config: Config) -> dict[str, Any]:
    """Times every row and writes the table; returns what the file holds."""
    model = MLP(num_units=(config.num_units, config.num_units))
    batch = make_batch(config)
    steps = {name: make_row(model, config, batch, row) for name, row in ROWS.items()}
    times_ms: dict[str, list[float]] = {name: [] for name in ROWS}
    order = list(ROWS)
    shuffle = random.Random(config.seed).shuffle
    for _ in tqdm(range(config.num_rounds), desc="rounds", disable=None):
        shuffle(order)
        for name in order:
            times_ms[name].append(steps[name]())
    runs = [_summary(name, times_ms) for name in ROWS]
    table = {
        "experiment": NAME,
        **{k: v for k, v in dataclasses.asdict(config).items() if k != "output"},
        "environment": results.environment(),
        "runs": runs,
    }
    platform = table["environment"]["platform"]
    version = f"jax{jax.__version__}"
    file = f"{NAME}_{platform}_{version}.json"
    output = config.output or Path(__file__).parent / "results" / file
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, table)
    precision = table["environment"]["float32_matmul_precision"]
    title = f"MLP 2 x {config.num_units}, batch {config.batch_size}, {platform}, "
    title += f"{version}, float32 matmul precision {precision}"
    results.print_table(title, COLUMNS, runs)
    return table


def make_batch(config: Config) -> dict[str, jax.Array]:
    """Returns random images (B, 784), labels (B,) and a full mask, on the device."""
    image_key, label_key = jax.random.split(jax.random.key(config.seed))
    return {
        "image": jax.random.uniform(image_key, (config.batch_size, 784)),
        "label": jax.random.randint(label_key, (config.batch_size,), 0, 10),
        "mask": jnp.ones(config.batch_size, bool),
    }


def make_row(model, config: Config, batch, row: Row) -> Callable[[], float]:
    """Returns a function that takes one warm step and returns its milliseconds."""
    params = model.init(jax.random.key(config.seed), batch["image"][:1])["params"]
    loss_fn = make_loss_fn(model)
    if row.policy is None:
        step, state = hand_written(loss_fn, params)
    else:
        tx = mpjax.with_loss_scale(rmsprop(1e-3), parse_loss_scale(row.loss_scale))
        state = mpjax.TrainState.create(params=params, tx=tx)
        step = mpjax.make_train_step(
            loss_fn, tx, policy=row.policy, autocast=row.autocast
        )
    compiled = step.lower(state, batch).compile()
    state, _ = jax.block_until_ready(compiled(state, batch))

    def timed() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        return 1000 * (time.perf_counter() - start)

    return timed


def hand_written(loss_fn, params) -> tuple[Any, Any]:
    """The step that a person would write: float32, no checks, donated state."""
    tx = rmsprop(1e-3)

    def step(state, batch):
        params, opt_state = state
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, aux), grads = grad_fn(params, batch, None)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss, **aux}

    return jax.jit(step, donate_argnums=0), (params, tx.init(params))


def _summary(name: str, times_ms: dict[str, list[float]]) -> dict[str, Any]:
    reference = ROWS[name].reference
    pairs = zip(times_ms[name], times_ms[reference], strict=True)
    times = times_ms[name]
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "name": name,
        "median_ms": statistics.median(times),
        "quartiles_ms": f"{quartiles[0]:.1f} to {quartiles[-1]:.1f}",
        "ratio": statistics.median(a / b for a, b in pairs),
        "reference": "-" if name == reference else reference,
        "times_ms": [round(t, 3) for t in times],
    }


if __name__ == "__main__":
    cli.run(main, Config, doc=__doc__)
