"""DeepConvNet on MNIST: trained in float32 and mixed, evaluated in six precisions.

    python -m experiments.mnist_convnet     # 20 min on 2 cores of an AMD EPYC; 99.4 %
    python -m experiments.mnist_convnet --load weights.safetensors --precisions float16

Adam with a one-cycle learning rate (a short warm-up, then a cosine to zero), batch 128,
dropout, no augmentation. The weights after the last step are evaluated on the 10,000
test images in float64, float32, bfloat16 and float16, and rounded to float8: float16
predicts what float64 does, in a quarter of the bytes. Every run leaves its weights,
which --load evaluates again, in 15 s.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax
from experiments import mnist_mlp
from experiments.data import mnist
from experiments.data.mnist import ImageDataset
from experiments.data.on_device import DeviceDataset
from experiments.harness import cli, loop, plots, precisions, results
from experiments.harness.config import BaseConfig, require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.files import (
    atomic_write,
    translate_os_errors,
    write_json,
    write_text,
)
from experiments.harness.recorder import read_rows
from experiments.harness.results import Column, Result
from experiments.harness.weights import read_weights, write_weights
from experiments.models.deep_convnet import DeepConvNet

NAME = "mnist_convnet"
PRECISIONS_NAME = f"{NAME}_precisions"
WARM_UP = 0.1  # share of the steps
WEIGHTS = "weights.safetensors"
COLUMNS = (
    Column("policy", "policy"),
    Column("loss scale", "loss_scale"),
    Column("epochs", "num_epochs"),
    Column("test loss", "test_loss", "{:.4f}"),
    Column("test accuracy", "test_accuracy", "{:.2%}"),
    Column("ms/step", "ms_per_step", "{:.1f}"),
    Column("compile s", "compile_s", "{:.1f}"),
    Column("skipped", "num_skipped"),
    Column("final scale", "final_loss_scale", "{:g}"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Settings of the experiment."""

    policies: str = "float32,mixed_float16,mixed_bfloat16"
    """Precision policies to train in, separated by commas; the same seed in each."""

    precisions: str = ",".join(precisions.PRECISIONS)
    """Precisions to evaluate the trained weights in, separated by commas; with float64,
    the others are compared with it."""

    num_epochs: int = 10
    """Passes over the training set."""

    batch_size: int = 128
    """Examples per step; the last batch of an epoch may be smaller."""

    learning_rate: float = 2e-3
    """The largest of Adam's, after the warm-up."""

    num_val: int = 1000
    """Training images, the last ones, that are held out for validation."""

    export: Path | None = None
    """Also write the weights trained in the first policy here, as safetensors."""

    load: Path | None = None
    """Evaluate the weights in this safetensors file; trains and writes nothing."""

    dataset: str = "mnist"
    """mnist, or digits (scikit-learn's 1797 small digits, without a network; no
    substitute)."""

    data_dir: Path | None = None
    """A TFDS directory to read MNIST from; by default the cache, then every source."""

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "num_epochs", "batch_size", "learning_rate", "num_val")
        if self.dataset not in mnist.DATASETS:
            raise ConfigError(
                f"--dataset must be one of {', '.join(mnist.DATASETS)}, "
                f"got {self.dataset!r}."
            )
        unknown = [n for n in self.precision_names() if n not in precisions.PRECISIONS]
        if unknown or not self.precision_names():
            raise ConfigError(
                f"--precisions must name some of {', '.join(precisions.PRECISIONS)}, "
                f"got {self.precisions!r}."
            )
        if self.load is not None:
            for flag in ("export", "workdir"):
                if getattr(self, flag) is not None:
                    raise ConfigError(
                        f"--load evaluates and writes nothing; leave --{flag} out."
                    )
        if self.export is not None:
            _check_target(self.export)

    def precision_names(self) -> tuple[str, ...]:
        """The precisions to evaluate in, in order, each once."""
        names = filter(None, map(str.strip, self.precisions.split(",")))
        return tuple(dict.fromkeys(names))

    def comparable(self) -> dict[str, Any]:
        """As every experiment's, but for where the weights go."""
        values = super().comparable()
        return {k: v for k, v in values.items() if k not in ("export", "load")}


def main(config: Config, dataset: ImageDataset | None = None) -> Result:
    """Trains once per policy, evaluates the weights, and leaves all in the workdir.

    Args:
      config: the settings.
      dataset: to train on, instead of the one the config names.

    Returns:
      The result; its runs have `test_accuracy`, `precisions` (a row per precision), …
      With `load`, one run that has `precisions` alone.

    Raises:
      ExperimentError: of the kind that fits (data, workdir, weights, interrupted, …).
      NonFiniteTrainingError: if the gradients stay non-finite.
    """
    dataset = dataset or mnist.load(config.dataset, config.data_dir)
    if config.load is not None:
        return evaluate_file(config, config.load, dataset)

    def train_one(config, policy, directory):
        return train_policy(config, policy, directory, dataset)

    result = results.run_policies(NAME, config, train_one)
    report(result, config, dataset.name)
    if config.export is not None:
        source = result.workdir / config.policy_names()[0] / WEIGHTS
        with (
            translate_os_errors(config.export.parent),
            atomic_write(config.export) as temporary,
        ):
            temporary.write_bytes(source.read_bytes())
        print(f"weights: {config.export}")
    return result


def evaluate_file(config: Config, path: Path, dataset: ImageDataset) -> Result:
    """Evaluates the weights of a file, and prints the table; writes nothing.

    Raises:
      WeightsError: if the file is damaged or holds another network's weights.
    """
    model = DeepConvNet()
    pixels = jnp.zeros((1, dataset.x_test[0].size))
    template = jax.eval_shape(model.init, jax.random.key(0), pixels)["params"]
    rows = evaluate(config, model, read_weights(path, template), path.stem, dataset)
    results.print_table(f"{dataset.name}, {path}", precisions.COLUMNS, rows)
    run = {"policy": path.stem, "precisions": rows}
    made_in = results.environment()
    return Result(NAME, path.parent, config.comparable(), made_in, [run])


def report(result: Result, config: Config, dataset_name: str) -> None:
    """Writes plots, tables and precisions.json, and prints the tables."""
    title = f"{dataset_name}, DeepConvNet, {config.num_epochs} epochs"
    workdir = result.workdir
    training = {
        run["policy"]: read_rows(workdir / run["policy"] / "metrics.jsonl")
        for run in result.runs
    }
    rows = [row for run in result.runs for row in run["precisions"]]
    tables = (
        results.markdown_table(COLUMNS, result.runs),
        results.markdown_table(precisions.COLUMNS, rows),
    )
    with translate_os_errors(workdir):
        plots.training_figure(workdir / "training.png", title, training)
        precisions.draw(workdir / "precisions.png", title, rows)
        write_text(workdir / "result.md", "\n".join((title + "\n", *tables)))
        held = {"experiment": PRECISIONS_NAME, "environment": result.environment}
        write_json(workdir / "precisions.json", {**held, "runs": rows})
    results.print_table(title, COLUMNS, result.runs)
    results.print_table("the same weights, evaluated", precisions.COLUMNS, rows)
    print(f"metrics, plots, weights and checkpoints: {workdir}")


def train_policy(
    config: Config, policy: str, directory: Path, dataset: ImageDataset
) -> dict[str, Any]:
    """Trains and evaluates in one policy; returns the run as plain values."""
    model = DeepConvNet()
    test_set = DeviceDataset(dataset.x_test, dataset.y_test, precisions.BATCH_SIZE)
    task, eval_step = make_task(config, policy, model, dataset)
    trained = loop.train(task, config, directory)
    params = trained.state.params
    with translate_os_errors(directory):
        write_weights(directory / WEIGHTS, params, architecture="DeepConvNet")
    test = mnist_mlp.evaluate(eval_step, trained.state, test_set, "test")
    print(f"{policy}: test accuracy {test['test_accuracy']:.2%}", flush=True)
    epochs = [row for row in trained.rows if row["kind"] == "epoch"]
    scaling = mpjax.loss_scale_state(trained.state.opt_state)
    return {
        "policy": policy,
        "loss_scale": config.loss_scale_name(policy),
        "seed": config.seed,
        "dataset": dataset.name,
        "source": dataset.source,
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "num_epochs": config.num_epochs,
        "num_steps": task.num_steps,
        **test,
        "val_loss": epochs[-1]["val_loss"],
        "val_accuracy": epochs[-1]["val_accuracy"],
        "ms_per_step": results.median([row["ms_per_step"] for row in epochs]),
        "compile_s": trained.compile_s,
        "num_skipped": int(scaling.num_skipped),
        "final_loss_scale": float(scaling.loss_scale.loss_scale),
        "precisions": evaluate(config, model, params, policy, dataset),
    }


def make_task(config: Config, policy: str, model: Any, dataset: ImageDataset):
    """Returns the loop's task and the evaluation step of a policy."""
    train_set, val_set = split(config, dataset)
    num_steps = train_set.num_batches * config.num_epochs
    loss_scale = config.make_loss_scale(policy)
    tx = mpjax.with_loss_scale(adam(config.learning_rate, num_steps), loss_scale)
    state = mnist_mlp.init_state(model, tx, policy, config.seed, dataset)
    eval_step = mnist_mlp.make_eval(model, policy, autocast=config.autocast)
    print(
        f"{policy}, loss scale {config.loss_scale_name(policy)}: "
        f"{train_set.num_examples:,} training images from {dataset.source}, "
        f"{jax.devices()[0].device_kind}",
        flush=True,
    )
    task = loop.Task(
        name=policy,
        state=state,
        train_step=mpjax.make_train_step(
            make_loss_fn(model), tx, policy=policy, autocast=config.autocast
        ),
        batches=lambda first_step: train_set.shuffled(config.seed, first_step),
        evaluate=lambda state: mnist_mlp.evaluate(eval_step, state, val_set, "val"),
        loss_scale=loss_scale,
        steps_per_epoch=train_set.num_batches,
        num_steps=num_steps,
        epoch_line=lambda row: results.epoch_line(row, config.num_epochs),
    )
    return task, eval_step


def evaluate(
    config: Config, model: Any, params: Any, policy: str, dataset: ImageDataset
) -> list[dict[str, Any]]:
    """Returns the rows of `precisions.evaluate` on the test images."""
    test_set = DeviceDataset(dataset.x_test, dataset.y_test, precisions.BATCH_SIZE)
    batches = [
        (b["image"][b["mask"]], b["label"][b["mask"]]) for b in test_set.in_order()
    ]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    names = config.precision_names()
    rows = precisions.evaluate(model, jax.device_get(params), images, labels, names)
    return [{"policy": policy, **row} for row in rows]


def split(config: Config, dataset: ImageDataset) -> tuple[DeviceDataset, DeviceDataset]:
    """Returns what to train on, and the end of the training set, to validate on.

    Raises:
      ConfigError: if nothing would be left to train on.
    """
    x, y = dataset.x_train, dataset.y_train
    num_train = len(x) - config.num_val
    if num_train < 1:
        raise ConfigError(
            f"--num-val {config.num_val} leaves none of {len(x)} images to train on; "
            "hold out fewer."
        )
    return (
        DeviceDataset(x[:num_train], y[:num_train], config.batch_size),
        DeviceDataset(x[num_train:], y[num_train:], precisions.BATCH_SIZE),
    )


def adam(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam; its learning rate rises over a tenth of the steps, then falls to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, round(WARM_UP * num_steps)), max(2, num_steps)
    )
    return optax.adam(schedule)


def make_loss_fn(model: Any):
    """Returns `loss_fn(params, batch, key) -> (loss, aux)`, with dropout."""

    def loss_fn(params, batch, key):
        out = model.apply(
            {"params": params}, batch["image"], train=True, rngs={"dropout": key}
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            out.astype(jnp.float32), batch["label"]
        )
        num = jnp.sum(batch["mask"])
        correct = (jnp.argmax(out, axis=-1) == batch["label"]) & batch["mask"]
        aux = {"accuracy": jnp.sum(correct) / num, "num_examples": num}
        return jnp.sum(jnp.where(batch["mask"], losses, 0)) / num, aux

    return loss_fn


def _check_target(path: Path) -> None:
    """Raises ConfigError, before the training, where --export cannot be written."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"--export: cannot write {path}; expected a file's name in a directory "
            "that exists and can be written."
        )


if __name__ == "__main__":
    cli.run(main, Config, doc=__doc__)
