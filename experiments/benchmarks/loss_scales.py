"""Loss scales beside each other in float16: skipped steps, underflow, gradients, time.

    python -m experiments.benchmarks.loss_scales               # 4 min on 2 CPU cores

Two networks on MNIST, each with the same seeds, data and steps under every loss scale:
`mlp` is the Keras guide's with 512 units and batch 256; `gru` reads an image 8 pixels
at a time and predicts the next 8 in 16 levels of grey. Its loss is a mean over 50,000
outputs, whose gradients float16 has as zero wherever a level is improbable.
`zero` is the share of the true gradient (float32, at the same parameters) that float16
has as zero at the scale of that step; `error` is ||g - g32|| / ||g32|| of the gradient
that the step computes: means over samples of the run. Step times are interleaved.
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
import numpy as np
import optax
from tqdm.auto import tqdm

import mpjax
from experiments.data import mnist
from experiments.data.on_device import DeviceDataset
from experiments.harness import cli, results
from experiments.harness.config import require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.files import atomic_write, write_json
from experiments.harness.loss_scales import parse_loss_scale, split_loss_scales
from experiments.harness.results import Column
from experiments.models.classification import make_loss_fn
from experiments.models.gru import GRU
from experiments.models.mlp import MLP
from experiments.models.optimizers import rmsprop
from mpjax._struct import replace_leaves
from mpjax.numerics import exponent_histogram, representable_fraction

NAME = "loss_scales"
POLICY = "mixed_float16"
NUM_VAL = 2000  # examples at most, of the last fifth of the training set
PIECE, NUM_LEVELS = 8, 16  # pixels that the GRU reads at a time, and greys it predicts
EARLY = 10  # the step whose scale tells how fast a bad start is left
COLUMNS = (
    Column("network", "network"),
    Column("loss scale", "loss_scale"),
    Column("skipped", "num_skipped", "{:.3g}"),
    Column(f"scale after {EARLY}", "early_loss_scale"),
    Column("final scale", "final_loss_scale"),
    Column("zero", "zero_fraction", "{:.3%}"),
    Column("error", "gradient_error", "{:.1e}"),
    Column("validation loss", "val_loss"),
    Column("time to dynamic", "time_ratio", "{:.3f}"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run."""

    networks: str = "mlp,gru"
    """Networks, separated by commas."""

    loss_scales: str = (
        "none,static:2**10,dynamic,histogram,"
        "dynamic:1,histogram:1,dynamic:2**24,histogram:2**24"
    )
    """Loss scales, separated by commas."""

    num_steps: int = 150
    """Steps per run, skipped ones included."""

    num_seeds: int = 3
    """Seeds 0, 1, … of parameters and shuffling."""

    sample_every: int = 20
    """Steps between two comparisons with the float32 gradient."""

    num_rounds: int = 31
    """How often each step is timed."""

    dataset: str = "mnist"
    """As in mnist_mlp."""

    output: Path | None = None
    """The result file, and with the ending .png the plot; a name in experiments/results
    by default."""

    def __post_init__(self):
        names = ("num_steps", "num_seeds", "sample_every", "num_rounds")
        require_positive(self, *names)
        for name in self.network_names():
            if name not in TASKS:
                raise ConfigError(
                    f"--networks: no {name!r}; there are {', '.join(TASKS)}."
                )
        for text in split_loss_scales(self.loss_scales):
            try:
                parse_loss_scale(text)
            except ValueError as error:
                raise ConfigError(f"--loss-scales: {error}") from error

    def network_names(self) -> list[str]:
        """The networks to train, in order."""
        return [name.strip() for name in self.networks.split(",") if name.strip()]


class Task(NamedTuple):
    """A network, its loss and optimizer, and how many examples a step takes."""

    model: Any
    input_shape: tuple[int, ...]
    loss_fn: Callable[..., Any]
    tx: optax.GradientTransformation
    batch_size: int


def main(config: Config) -> dict[str, Any]:
    """Trains all, and writes the table and the plot; returns what the file holds.

    Raises:
      ExperimentError: of the kind that fits.
    """
    dataset = mnist.load(config.dataset)
    scales = split_loss_scales(config.loss_scales)
    rows, paths = [], {}
    for network in config.network_names():
        study = _Study(TASKS[network](), config, dataset)
        for text in tqdm(scales, desc=network, disable=None):
            runs = [study.train(text, seed) for seed in range(config.num_seeds)]
            rows.append(_aggregate(network, text, runs))
            paths[network, text] = runs[0]
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
    output = config.output or Path(__file__).parents[1] / "results" / file
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, table)
    draw(output.with_suffix(".png"), paths)
    results.print_table(f"loss scales, {POLICY}, {platform}", COLUMNS, rows)
    return table


def mlp() -> Task:
    """The Keras guide's network, with 512 units and batch 256."""
    model = MLP(num_units=(512, 512))
    return Task(model, (784,), make_loss_fn(model), rmsprop(1e-3), 256)


def gru() -> Task:
    """64 units over 97 steps; mean cross entropy of the next 8 pixels' levels."""
    model = GRU(num_units=64, num_outputs=PIECE * NUM_LEVELS)

    def loss_fn(params, batch, key):
        del key
        pieces = batch["image"].reshape(len(batch["image"]), -1, PIECE)
        logits: Any = model.apply({"params": params}, pieces[:, :-1])
        logits = logits.reshape(*logits.shape[:-1], PIECE, NUM_LEVELS)
        levels = jnp.round(pieces[:, 1:] * (NUM_LEVELS - 1)).astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), levels
        )
        return losses.mean(), {}

    return Task(model, (784 // PIECE - 1, PIECE), loss_fn, optax.adam(2e-3), 64)


TASKS = {"mlp": mlp, "gru": gru}


def draw(path: Path, runs: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Draws the scale over steps of the first seed, a panel per network.

    Args:
      path: the PNG to write.
      runs: by network and loss scale.
    """
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(network for network, _ in runs))
    scales = list(dict.fromkeys(text for _, text in runs))
    figure = Figure(figsize=(5.5 * len(networks), 4.5), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    for (network, text), run in runs.items():
        axes, path_ = panels[networks.index(network)], np.array(run["loss_scales"])
        color = f"C{scales.index(text)}"
        axes.step(np.arange(len(path_)), path_, where="post", color=color, label=text)
        skipped = np.flatnonzero(~np.array(run["grads_finite"]))
        axes.plot(skipped, path_[skipped], "x", color=color, ms=5)
        axes.set_title(f"{network}: loss scale (crosses: skipped steps)", fontsize=10)
    for axes in panels:
        axes.set_yscale("log", base=2)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(left=-0.5)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


class _Study:
    """One network; what is compiled for a loss scale serves every start of its kind."""

    def __init__(self, task: Task, config: Config, dataset: mnist.ImageDataset):
        self.task, self.config = task, config
        x, y = dataset.x_train, dataset.y_train
        num_train = len(x) * 4 // 5
        self.train_set = DeviceDataset(x[:num_train], y[:num_train], task.batch_size)
        x, y = (a[num_train : num_train + NUM_VAL] for a in (x, y))
        self.val_batch = next(DeviceDataset(x, y, NUM_VAL).in_order())
        self.steps: dict[Any, Any] = {}
        self.compare = jax.jit(_comparison(task.loss_fn))
        loss = lambda params, batch: task.loss_fn(params, batch, None)[0]
        self.val_loss = jax.jit(loss)

    def train(self, text: str, seed: int) -> dict[str, Any]:
        """Returns what a run of one seed measures."""
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
        """Step times to those of `dynamic`: with a sample, without, and on average."""
        step, state, batches = self.start(text, 0)
        batch, clean = next(batches), jnp.int32(1)
        scaling = replace_leaves(state.opt_state.loss_scale, num_finite_steps=clean)
        opt_state = state.opt_state._replace(loss_scale=scaling)
        between = dataclasses.replace(state, opt_state=opt_state)
        calls = {"sample": (step, state), "between": (step, between)}
        calls["dynamic"] = self.start("dynamic", 0)[:2]
        times: dict[str, list[float]] = {name: [] for name in calls}
        order, shuffle = [*calls], random.Random(0).shuffle
        for index in range(self.config.num_rounds + 1):
            shuffle(order)
            for name in order:
                step, state = calls[name]
                start = time.perf_counter()
                jax.block_until_ready(step(state, batch))
                if index:  # the first compiles
                    times[name].append(time.perf_counter() - start)
        sample, between = (_ratio(times[n], times["dynamic"]) for n in [*calls][:2])
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
    """`(params, batch, scale) -> (share that becomes zero, error of the gradient)`."""

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


def _ratio(times: list[float], reference: list[float]) -> float:
    pairs = zip(times, reference, strict=True)
    return statistics.median(a / b for a, b in pairs)


def _aggregate(network: str, text: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [run["val_loss"] for run in runs]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    paths = [run["loss_scales"] for run in runs]
    skipped = [run["grads_finite"].count(False) for run in runs]
    return {
        "network": network,
        "loss_scale": text,
        "num_skipped": statistics.mean(skipped),
        "early_loss_scale": _powers(
            [path[min(EARLY, len(path) - 1)] for path in paths]
        ),
        "final_loss_scale": _powers([path[-1] for path in paths]),
        "zero_fraction": _mean([run["zero_fraction"] for run in runs]),
        "gradient_error": _mean([run["gradient_error"] for run in runs]),
        "val_loss": f"{statistics.mean(losses):.4f} ± {spread:.4f}",
        "val_losses": losses,
        "nums_skipped": skipped,
        "paths": [_changes(path) for path in paths],
    }


def _changes(path: list[float]) -> list[tuple[int, float]]:
    """The steps at which the scale is another than before."""
    pairs = enumerate(path)
    return [(i, scale) for i, scale in pairs if i == 0 or path[i - 1] != scale]


def _powers(scales: list[float]) -> str:
    """`2^10`, or `2^10 to 2^12`."""
    low, high = (f"2^{np.log2(x):g}" for x in (min(scales), max(scales)))
    return low if low == high else f"{low} to {high}"


def _mean(values: list[float]) -> float:
    """Of those that are finite: a gradient that overflows has no error to average."""
    finite = [float(x) for x in values if np.isfinite(x)]
    return statistics.mean(finite) if finite else float("nan")


if __name__ == "__main__":
    cli.run(main, Config, doc=__doc__)
