"""Loss scales in float16: skipped steps, underflow, gradient errors, step times.

    python -m experiments.benchmarks.loss_scales               # 4 min on 2 CPU cores

Trains two networks on MNIST, with the same seeds, data and steps under every loss
scale: `mlp` is the Keras guide's network with 512 units and batch 256; `gru` reads an
image 8 pixels at a time and predicts the next 8 in 16 levels of grey. The GRU's loss is
a mean over 50,000 outputs, whose gradients flush to zero in float16 wherever a level is
improbable.

`zero` is the share of the true gradient (float32, at the same parameters) that flushes
to zero in float16 at the scale of that step; `error` is ||g - g32|| / ||g32||, where g
is the gradient that the step computes. Both are means over samples of the run. Step
times are interleaved.
"""

from experiments.configs.loss_scales import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.benchmarks.loss_scales", Config, doc=__doc__)

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm.auto import tqdm

import mpjax
from experiments.benchmarks._timing import median_ratio, time_rounds
from experiments.data import mnist
from experiments.data.on_device import DeviceDataset
from experiments.harness import plot_style, results
from experiments.harness.flags import split_loss_scales
from experiments.harness.loss_scales import parse_loss_scale
from experiments.harness.output import (
    RESULTS,
    mean_and_deviation,
    save_figure,
    save_table,
)
from experiments.harness.plot_style import decorate
from experiments.harness.results import Column
from experiments.models.classification import make_loss_fn
from experiments.models.gru import GRU
from experiments.models.mlp import MLP
from experiments.models.optimizers import rmsprop
from mpjax._struct import replace_leaves
from mpjax.numerics import exponent_histogram, representable_fraction

NAME = "loss_scales"
POLICY = "mixed_float16"
MAX_VAL = 2000  # validation examples, from the last fifth of the training set
PIECE_SIZE = 8  # pixels that the GRU reads at a time
NUM_LEVELS = 16  # levels of grey that it predicts
EARLY_STEP = 10  # its scale shows how fast a run leaves a bad start
COLUMNS = (
    Column("network", "network"),
    Column("loss scale", "loss_scale"),
    Column("skipped", "num_skipped", "{:.3g}"),
    Column(f"scale after {EARLY_STEP}", "early_loss_scale"),
    Column("final scale", "final_loss_scale"),
    Column("zero", "zero_fraction", "{:.3%}"),
    Column("error", "gradient_error", "{:.1e}"),
    Column("validation loss", "val_loss"),
    Column("time to dynamic", "time_ratio", "{:.3f}"),
)


class Task(NamedTuple):
    """A network, its loss and optimizer, and how many examples a step takes."""

    model: Any
    input_shape: tuple[int, ...]
    loss_fn: Callable[..., Any]
    tx: optax.GradientTransformation
    batch_size: int


def main(config: Config) -> dict[str, Any]:
    """Trains every network with every loss scale; writes the table and the plot.

    Returns:
      What the result file holds.

    Raises:
      DataError: if the data are unavailable.
      WorkdirError: if the result cannot be written.
    """
    dataset = mnist.load(config.dataset)
    scales = split_loss_scales(config.loss_scales)
    rows = []
    for network in config.network_names():
        study = _Study(TASKS[network](), config, dataset)
        for text in tqdm(scales, desc=network, disable=None):
            runs = [study.train(text, seed) for seed in range(config.num_seeds)]
            rows.append(_aggregate(network, text, runs))
            if text == "histogram":
                rows[-1] |= study.time_ratio(text)
    table = {
        "experiment": NAME,
        **{k: v for k, v in dataclasses.asdict(config).items() if k != "output"},
        "environment": results.environment(),
        "runs": rows,
    }
    platform = table["environment"]["platform"]
    file = f"{NAME}_{platform}_jax{jax.__version__}.json"
    output = config.output or RESULTS / file
    save_table(output, table, f"loss scales, {POLICY}, {platform}", COLUMNS)
    save_figure(output.with_suffix(".png"), draw(table))
    return table


def mlp() -> Task:
    """Returns the Keras guide's network, with 512 units and batch 256."""
    model = MLP(num_units=(512, 512))
    return Task(model, (784,), make_loss_fn(model), rmsprop(1e-3), 256)


def gru() -> Task:
    """Returns a GRU of 64 units over 97 steps.

    Its loss is the mean cross entropy of the next 8 pixels' levels.
    """
    model = GRU(num_units=64, num_outputs=PIECE_SIZE * NUM_LEVELS)

    def loss_fn(params, batch, key):
        del key
        pieces = batch["image"].reshape(len(batch["image"]), -1, PIECE_SIZE)
        logits: Any = model.apply({"params": params}, pieces[:, :-1])
        logits = logits.reshape(*logits.shape[:-1], PIECE_SIZE, NUM_LEVELS)
        levels = jnp.round(pieces[:, 1:] * (NUM_LEVELS - 1)).astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), levels
        )
        return losses.mean(), {}

    return Task(
        model, (784 // PIECE_SIZE - 1, PIECE_SIZE), loss_fn, optax.adam(2e-3), 64
    )


TASKS = {"mlp": mlp, "gru": gru}


def draw(table: dict[str, Any]) -> Figure:
    """Draws the loss scale over steps, with the seeds' range; a panel per network.

    Args:
      table: what the result file holds.
    """
    rows, num_steps = table["runs"], table["num_steps"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    title = f"Loss scales in {POLICY}: median and range of {table['num_seeds']} seeds"
    figure = plot_style.new_figure(3.0 * len(networks) + 0.5, title)
    panels = figure.subplots(len(networks), 1, sharex=True, squeeze=False)[:, 0]
    styles = _line_styles(list(dict.fromkeys(row["loss_scale"] for row in rows)))
    steps = np.arange(1, num_steps + 1)
    for axes, network in zip(panels, networks, strict=True):
        own = [row for row in rows if row["network"] == network]
        last = lambda row: np.median([path[-1][1] for path in row["paths"]])
        for row in sorted(own, key=last, reverse=True):  # the key's order
            paths = [_every_step(path, num_steps) for path in row["paths"]]
            style, skipped = styles[row["loss_scale"]], row["num_skipped"]
            more = f", {skipped:.2g} skipped" if skipped else ""
            style = style | {"label": row["loss_scale"] + more}
            axes.step(steps, np.median(paths, axis=0), where="post", **style)
            ends = np.min(paths, axis=0), np.max(paths, axis=0)
            band = {"color": style["color"], "alpha": 0.2, "lw": 0, "step": "post"}
            axes.fill_between(steps, *ends, **band)
        xlabel = "step, the first is 1" if axes is panels[-1] else None
        decorate(axes, network, xlabel, "loss scale")
        plot_style.log2_axis(axes.yaxis)
    plot_style.log_axis(panels[-1].xaxis)
    for axes in panels:  # a key shows the dashes, unlike labels at the ends
        plot_style.key_beside(axes)
    return figure


def _line_styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """Returns a colour per kind of loss scale, and dashes per value it starts from."""
    kinds = {"none": "unscaled", "static": "scale_1024"}  # named as in `COLORS`
    styles = plot_style.line_styles(names)
    seen: list[str] = []
    for name, style in styles.items():
        kind = name.partition(":")[0]
        dashes = plot_style.DASHES[seen.count(kind) % len(plot_style.DASHES)]
        seen.append(kind)
        color = plot_style.COLORS[kinds.get(kind, kind)]
        style |= {"color": color, "ls": dashes, "lw": 0.7 * style["lw"]}
    return styles


def _every_step(path: list[tuple[int, float]], num_steps: int) -> np.ndarray:
    """Returns the scale at every step, the inverse of `_changes`."""
    starts, scales = zip(*path, strict=True)
    return np.repeat(scales, np.diff([*starts, num_steps]))


class _Study:
    """Trains one network; loss scales that differ in their start share a step."""

    def __init__(self, task: Task, config: Config, dataset: mnist.ImageDataset):
        self.task, self.config = task, config
        x, y = dataset.x_train, dataset.y_train
        num_train = len(x) * 4 // 5
        self.train_set = DeviceDataset(x[:num_train], y[:num_train], task.batch_size)
        x, y = (a[num_train : num_train + MAX_VAL] for a in (x, y))
        self.val_batch = next(DeviceDataset(x, y, MAX_VAL).in_order())
        self.steps: dict[Any, Any] = {}
        self.compare = jax.jit(_comparison(task.loss_fn))
        loss = lambda params, batch: task.loss_fn(params, batch, None)[0]
        self.val_loss = jax.jit(loss)

    def train(self, text: str, seed: int) -> dict[str, Any]:
        """Trains with one loss scale and seed; returns what was measured on the way."""
        step, state, batches = self.start(text, seed)
        metrics, samples = [], []
        for index in range(self.config.num_steps):
            params, batch = state.params, next(batches)
            state, measured = step(state, batch)
            metrics.append({k: measured[k] for k in ("loss_scale", "grads_finite")})
            if index % self.config.sample_every == 0:
                samples.append(self.compare(params, batch, measured["loss_scale"]))
            jax.block_until_ready(state)
        metrics, samples = jax.device_get((metrics, samples))
        return {
            "loss_scales": [float(m["loss_scale"]) for m in metrics],
            "grads_finite": [bool(m["grads_finite"]) for m in metrics],
            "zero_fraction": _mean([zero for zero, _ in samples]),
            "gradient_error": _mean([error for _, error in samples]),
            "val_loss": float(self.val_loss(state.params, self.val_batch)),
        }

    def time_ratio(self, text: str) -> dict[str, float]:
        """Returns step times relative to `dynamic`: average, sampling, not sampling."""
        step, state, batches = self.start(text, 0)
        batch = next(batches)
        # After one finite step it does not sample until the interval is over.
        scaling = replace_leaves(
            state.opt_state.loss_scale, num_finite_steps=jnp.int32(1)
        )
        opt_state = state.opt_state._replace(loss_scale=scaling)
        between = dataclasses.replace(state, opt_state=opt_state)
        steps = {"sample": (step, state), "between": (step, between)}
        steps["dynamic"] = self.start("dynamic", 0)[:2]
        calls = {
            name: lambda step=step, state=state: jax.block_until_ready(
                step(state, batch)
            )
            for name, (step, state) in steps.items()
        }
        for call in calls.values():
            call()  # compiles
        times = time_rounds(calls, self.config.num_rounds)
        sample, between = (
            median_ratio(times[name], times["dynamic"])
            for name in ("sample", "between")
        )
        share = 1 / parse_loss_scale(text).interval
        return {
            "time_ratio": share * sample + (1 - share) * between,
            "time_ratio_of_samples": sample,
            "time_ratio_between_samples": between,
        }

    def start(self, text: str, seed: int) -> tuple[Any, mpjax.TrainState, Any]:
        """Returns the step, and the initial state and the batches of a seed."""
        task, scale = self.task, parse_loss_scale(text)
        tx = mpjax.with_loss_scale(task.tx, scale)
        step = self.steps.setdefault(
            jax.tree.structure(scale),
            mpjax.make_train_step(task.loss_fn, tx, policy=POLICY, donate=False),
        )
        inputs = jnp.zeros((1, *task.input_shape))
        params = task.model.init(jax.random.key(seed), inputs)["params"]
        state = mpjax.TrainState.create(params=params, tx=tx)
        return step, state, self.train_set.shuffled(seed)


def _comparison(loss_fn) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns `(params, batch, scale) -> (share flushed to zero, gradient error)`."""

    def scaled(params, batch, scale):
        loss, _ = loss_fn(params, batch, None)
        return mpjax.StaticLossScale(scale).scale(loss)

    gradient = jax.grad(scaled)
    half = mpjax.autocast(gradient, POLICY)

    def compare(params, batch, scale):
        truth = gradient(params, batch, jnp.float32(1))
        grads = mpjax.StaticLossScale(scale).unscale(half(params, batch, scale))
        difference = jax.tree.map(jnp.subtract, grads, truth)
        share = representable_fraction(exponent_histogram(truth), "float16", scale)
        return share.zero, optax.tree.norm(difference) / optax.tree.norm(truth)

    return compare


def _aggregate(network: str, text: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row of a network and loss scale, from the runs of its seeds."""
    losses = [run["val_loss"] for run in runs]
    paths = [run["loss_scales"] for run in runs]
    skipped = [run["grads_finite"].count(False) for run in runs]
    return {
        "network": network,
        "loss_scale": text,
        "num_skipped": statistics.mean(skipped),
        "early_loss_scale": _powers(
            [path[min(EARLY_STEP, len(path) - 1)] for path in paths]
        ),
        "final_loss_scale": _powers([path[-1] for path in paths]),
        "zero_fraction": _mean([run["zero_fraction"] for run in runs]),
        "gradient_error": _mean([run["gradient_error"] for run in runs]),
        "val_loss": mean_and_deviation(losses),
        "val_losses": losses,
        "nums_skipped": skipped,
        "paths": [_changes(path) for path in paths],
    }


def _changes(path: list[float]) -> list[tuple[int, float]]:
    """Returns the steps at which the scale changes, with the new scale."""
    pairs = enumerate(path)
    return [(i, scale) for i, scale in pairs if i == 0 or path[i - 1] != scale]


def _powers(scales: list[float]) -> str:
    """Returns a range of scales as text: `2^10`, or `2^10 to 2^12`."""
    low, high = (f"2^{np.log2(x):g}" for x in (min(scales), max(scales)))
    return low if low == high else f"{low} to {high}"


def _mean(values: list[float]) -> float:
    """Returns the mean of the finite values: an overflow has no error to average."""
    finite = [float(x) for x in values if np.isfinite(x)]
    return statistics.mean(finite) if finite else float("nan")
