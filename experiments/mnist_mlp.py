"""The Keras mixed-precision guide on MNIST: float32 beside mixed_float16.

    python -m experiments.mnist_mlp --num-units 512      # a laptop
    python -m experiments.mnist_mlp                      # 4096 units, as the guide

784 → Dense 4096 relu → Dense 4096 relu → Dense 10 → softmax in float32; RMSprop, batch
8192, 5 epochs, the last 20 % of the training set for validation.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import mpjax
from experiments.data import mnist
from experiments.data.mnist import ImageDataset
from experiments.data.on_device import DeviceDataset
from experiments.harness import cli, loop, numerics, plots, results
from experiments.harness.config import BaseConfig, require, require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.files import translate_os_errors, write_text
from experiments.harness.numerics_plots import numerics_figure
from experiments.harness.recorder import read_rows
from experiments.harness.results import Column, Result
from experiments.models.mlp import MLP
from mpjax.numerics import tap

NAME = "mnist_mlp"
EVAL_BATCH_SIZE = 2000
COLUMNS = (
    Column("policy", "policy"),
    Column("loss scale", "loss_scale"),
    Column("test loss", "test_loss", "{:.4f}"),
    Column("test accuracy", "test_accuracy", "{:.4f}"),
    Column("ms/step", "ms_per_step", "{:.1f}"),
    Column("compile s", "compile_s", "{:.1f}"),
    Column("skipped", "num_skipped"),
    Column("final scale", "final_loss_scale", "{:g}"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Settings of the experiment; the defaults are the guide's."""

    num_units: int = 4096
    """Units in each of the two hidden layers."""

    num_epochs: int = 5
    """Passes over the training set."""

    batch_size: int = 8192
    """Examples per step; the last batch of an epoch is smaller."""

    learning_rate: float = 1e-3
    """Of RMSprop."""

    validation_split: float = 0.2
    """The share of the training set, at its end, that is held out."""

    dataset: str = "mnist"
    """mnist, or digits (scikit-learn's 1797 small digits, without a network; much
    easier, no substitute)."""

    data_dir: Path | None = None
    """A TFDS directory to read MNIST from; by default the cache, then every source."""

    numerics: bool = False
    """Count the exponents of what every matmul gives, forward and backward, and draw
    them (numerics.png)."""

    numerics_interval: int = 5
    """With --numerics: steps from one count to the next."""

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "num_units", "num_epochs", "batch_size", "learning_rate")
        require_positive(self, "numerics_interval")
        split = self.validation_split
        require(0 < split < 1, "--validation-split", "between 0 and 1", self)
        if self.dataset not in mnist.DATASETS:
            raise ConfigError(
                f"--dataset must be one of {', '.join(mnist.DATASETS)}, "
                f"got {self.dataset!r}."
            )


def main(config: Config, dataset: ImageDataset | None = None) -> Result:
    """Trains once per policy, compares, and leaves everything in the workdir.

    Args:
      config: the settings.
      dataset: to train on, instead of the one the config names.

    Returns:
      The result; its runs have `test_loss`, `test_accuracy`, `ms_per_step`, …

    Raises:
      ExperimentError: of the kind that fits (data, workdir, checkpoint, interrupted).
      NonFiniteTrainingError: if the gradients stay non-finite.
    """
    dataset = dataset or mnist.load(config.dataset, config.data_dir)

    def train_one(config, policy, directory):
        return train_policy(config, policy, directory, dataset)

    result = results.run_policies(NAME, config, train_one)
    report(result, config, dataset.name)
    return result


def report(result: Result, config: Config, dataset_name: str) -> None:
    """Writes the plot and the table into the workdir, and prints the table."""
    title = f"{dataset_name}, MLP 2 x {config.num_units}, batch {config.batch_size}"
    rows = {
        run["policy"]: read_rows(result.workdir / run["policy"] / "metrics.jsonl")
        for run in result.runs
    }
    table = results.markdown_table(COLUMNS, result.runs)
    with translate_os_errors(result.workdir):
        plots.training_figure(result.workdir / "training.png", title, rows)
        write_text(result.workdir / "result.md", f"{title}\n\n{table}")
        for policy in rows if config.numerics else ():
            path = result.workdir / policy / "numerics.png"
            numerics_figure(path, f"{title}, {policy}", rows[policy])
    results.print_table(title, COLUMNS, result.runs)
    print(f"metrics, plots and checkpoints: {result.workdir}")


def train_policy(
    config: Config, policy: str, directory: Path, dataset: ImageDataset
) -> dict[str, Any]:
    """Trains and tests the network in one policy; returns the run as plain values."""
    train_set, valid_set = split(config, dataset)
    test_set = DeviceDataset(dataset.x_test, dataset.y_test, EVAL_BATCH_SIZE)
    model = MLP(num_units=(config.num_units, config.num_units))
    loss_scale = config.make_loss_scale(policy)
    tx = mpjax.with_loss_scale(rmsprop(config.learning_rate), loss_scale)
    state = init_state(model, tx, policy, config.seed, dataset)
    eval_step = make_eval(model, policy, autocast=config.autocast)
    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    print(
        f"{policy}, loss scale {config.loss_scale_name(policy)}: {num_parameters:,} "
        f"parameters, {train_set.num_examples:,} training images from "
        f"{dataset.source}, {jax.devices()[0].device_kind}",
        flush=True,
    )
    loss_fn = make_loss_fn(model)
    train_step = mpjax.make_train_step(
        tap(loss_fn) if config.numerics else loss_fn,
        tx,
        policy=policy,
        autocast=config.autocast,
    )
    if config.numerics:
        train_step = numerics.counting(train_step, config.numerics_interval)
    task = loop.Task(
        name=policy,
        state=state,
        train_step=train_step,
        batches=lambda first_step: train_set.shuffled(config.seed, first_step),
        evaluate=lambda state: evaluate(eval_step, state, valid_set, "val"),
        loss_scale=loss_scale,
        steps_per_epoch=train_set.num_batches,
        num_steps=train_set.num_batches * config.num_epochs,
        epoch_line=lambda row: results.epoch_line(row, config.num_epochs),
    )
    trained = loop.train(task, config, directory)
    test = evaluate(eval_step, trained.state, test_set, "test")
    epochs = [row for row in trained.rows if row["kind"] == "epoch"]
    last = epochs[-1] if epochs else {}
    scaling = mpjax.loss_scale_state(trained.state.opt_state)
    print(
        f"{policy}: test loss {test['test_loss']:.4f}, "
        f"accuracy {test['test_accuracy']:.4f}; compiled in {trained.compile_s:.1f} s",
        flush=True,
    )
    return {
        "policy": policy,
        "loss_scale": config.loss_scale_name(policy),
        "seed": config.seed,
        "dataset": dataset.name,
        "source": dataset.source,
        "num_parameters": num_parameters,
        "num_steps": task.num_steps,
        **test,
        "val_loss": last.get("val_loss"),
        "val_accuracy": last.get("val_accuracy"),
        "ms_per_step": results.median([row["ms_per_step"] for row in epochs]),
        "compile_s": trained.compile_s,
        "num_skipped": int(scaling.num_skipped),
        "final_loss_scale": float(scaling.loss_scale.loss_scale),
    }


def split(config: Config, dataset: ImageDataset) -> tuple[DeviceDataset, DeviceDataset]:
    """Returns what to train on, and the end of the training set, to validate on.

    Raises:
      ConfigError: if one of them would be empty.
    """
    x, y = dataset.x_train, dataset.y_train
    num_train = round(len(x) * (1 - config.validation_split))
    if not 0 < num_train < len(x):
        raise ConfigError(
            f"--validation-split {config.validation_split} leaves {num_train} of "
            f"{len(x)} images to train on; expected some on either side."
        )
    return (
        DeviceDataset(x[:num_train], y[:num_train], config.batch_size),
        DeviceDataset(x[num_train:], y[num_train:], EVAL_BATCH_SIZE),
    )


def rmsprop(learning_rate: float) -> optax.GradientTransformation:
    """RMSprop with the constants of Keras: rho 0.9, epsilon 1e-7 inside the root."""
    return optax.rmsprop(learning_rate, decay=0.9, eps=1e-7, eps_in_sqrt=True)


def init_state(model, tx, policy: str, seed: int, dataset: ImageDataset):
    """Returns the initial `TrainState`; parameters in the policy's parameter dtype."""
    init_key, key = jax.random.split(jax.random.key(seed))
    pixels = dataset.x_train[0].size
    params = model.init(init_key, jnp.zeros((1, pixels)))["params"]
    params = mpjax.get_policy(policy).cast_to_param(params)
    return mpjax.TrainState.create(params=params, tx=tx, key=key)


def make_loss_fn(model):
    """Returns `loss_fn(params, batch, key) -> (loss, aux)`; softmax in float32."""

    def loss_fn(params, batch, key):
        del key
        sums = _sums(model, params, batch)
        num = jnp.maximum(sums["num_examples"], 1)
        accuracy = sums["num_correct"] / num
        aux = {"accuracy": accuracy, "num_examples": sums["num_examples"]}
        return sums["loss"] / num, aux

    return loss_fn


def make_eval(model, policy: str, *, autocast: bool = True):
    """Returns a jitted `(state, batch) -> sums` over the batch's examples."""
    return mpjax.make_eval_step(
        lambda params, batch: _sums(model, params, batch),
        policy=policy,
        autocast=autocast,
    )


def evaluate(eval_step, state, dataset: DeviceDataset, prefix: str) -> dict[str, float]:
    """Returns the mean loss and the accuracy over a dataset, as Python floats."""
    sums = jax.device_get([eval_step(state, b) for b in dataset.in_order()])
    loss = sum(float(s["loss"]) for s in sums)
    num_correct = sum(int(s["num_correct"]) for s in sums)
    return {
        f"{prefix}_loss": loss / dataset.num_examples,
        f"{prefix}_accuracy": num_correct / dataset.num_examples,
    }


def _sums(model, params, batch) -> dict[str, jax.Array]:
    """Sums over the unmasked examples of a batch, in float32 and int32."""
    logits = model.apply({"params": params}, batch["image"]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = jnp.argmax(logits, axis=-1) == batch["label"]
    return {
        "loss": jnp.sum(jnp.where(batch["mask"], losses, 0)),
        "num_correct": jnp.sum(correct & batch["mask"]),
        "num_examples": jnp.sum(batch["mask"]),
    }


if __name__ == "__main__":
    cli.run(main, Config, doc=__doc__)
