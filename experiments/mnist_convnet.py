"""DeepConvNet on MNIST: trained in float32 and half, evaluated in six precisions.

    python -m experiments.mnist_convnet     # 20 to 25 min on 2 cores; 99.4 %
    python -m experiments.mnist_convnet --load weights.safetensors --precisions float16

Adam with a one-cycle learning rate (a short warm-up, then a cosine to zero), batch 128,
dropout, no augmentation. The weights after the last step are evaluated on the 10,000
test images in float64, float32, bfloat16 and float16, and rounded to float8: float16
predicts what float64 does, in a quarter of the bytes. Every run leaves its weights;
--load evaluates them again, in 15 s.
"""

from experiments.configs.mnist_convnet import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.mnist_convnet", Config, doc=__doc__)

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data.mnist import ImageDataset
from experiments.data.on_device import DeviceDataset
from experiments.data.splits import EVAL_BATCH_SIZE, Splits, split
from experiments.harness import precisions, results
from experiments.harness.experiment import Experiment, Metric, Task
from experiments.harness.files import atomic_write, translate_os_errors, write_json
from experiments.harness.output import count_text
from experiments.harness.plot_style import write_png
from experiments.harness.report import report
from experiments.harness.results import Column, Result
from experiments.harness.training import train_policy
from experiments.harness.weights import read_weights, write_weights
from experiments.models import classification
from experiments.models.deep_convnet import DeepConvNet
from experiments.models.optimizers import one_cycle

NAME = "mnist_convnet"
PRECISIONS_NAME = f"{NAME}_precisions"
WEIGHTS = "weights.safetensors"
EXPERIMENT = Experiment(
    NAME,
    metrics=(
        Metric("loss", "loss", is_larger_better=False),
        Metric("accuracy", "accuracy", is_larger_better=True, format="{:.2%}"),
    ),
    headline="accuracy",
    more_columns=(Column("epochs", "num_epochs"),),
)
COLUMNS = EXPERIMENT.columns()


def main(config: Config, dataset: ImageDataset | None = None) -> Result:
    """Trains once per policy, evaluates the weights, and leaves all in the workdir.

    Args:
      config: the settings.
      dataset: the data to train on, instead of those that the config names.

    Returns:
      The result; its runs have `test_accuracy`, `precisions` (a row per precision), …
      With `load`, one run that has `precisions` alone.

    Raises:
      ExperimentError: for data, files, weights or checkpoints that fail, or after a
        signal.
      NonFiniteTrainingError: if the gradients stay non-finite.
    """
    dataset = dataset or config.load_dataset()
    if config.load is not None:
        return evaluate_file(config, config.load, dataset)

    def train_one(config, policy, directory):
        return train_and_evaluate(config, policy, directory, dataset)

    result = results.run_policies(NAME, config, train_one)
    title = f"{dataset.name}, DeepConvNet, {count_text(config.num_epochs, 'epoch')}"
    report_precisions(result, title)
    if config.export is not None:
        source = result.workdir / config.policy_names()[0] / WEIGHTS
        export = config.export
        with translate_os_errors(export.parent), atomic_write(export) as temporary:
            temporary.write_bytes(source.read_bytes())
        print(f"weights: {export}")
    return result


def evaluate_file(config: Config, path: Path, dataset: ImageDataset) -> Result:
    """Evaluates the weights of a file, and prints the table; writes nothing.

    Raises:
      WeightsError: if the file is damaged or holds another network's weights.
    """
    image = jnp.zeros((1, *dataset.x_test.shape[1:]))
    init = DeepConvNet().init
    template = jax.eval_shape(init, jax.random.key(0), image)["params"]
    params = read_weights(path, template)
    test_set = DeviceDataset(dataset.x_test, dataset.y_test, EVAL_BATCH_SIZE)
    rows = evaluate(config, params, path.stem, test_set)
    results.print_table(f"{dataset.name}, {path}", precisions.COLUMNS, rows)
    run = {"policy": path.stem, "precisions": rows}
    made_in = results.environment()
    return Result(NAME, path.parent, config.comparable(), made_in, [run])


def report_precisions(result: Result, title: str) -> None:
    """Writes and prints the tables and plots of the training and of the precisions."""
    rows = [row for run in result.runs for row in run["precisions"]]
    with translate_os_errors(result.workdir):
        table = {"experiment": PRECISIONS_NAME, "title": title}
        table |= {"environment": result.environment, "runs": rows}
        write_json(result.workdir / "precisions.json", table)
        write_png(result.workdir / "precisions.png", precisions.draw(table))
    of_precisions = ("the same weights, evaluated", precisions.COLUMNS, rows)
    report(EXPERIMENT, result, title, of_precisions)


def train_and_evaluate(
    config: Config, policy: str, directory: Path, dataset: ImageDataset
) -> dict[str, Any]:
    """Trains in one policy, writes the weights, and evaluates them in each precision.

    Returns:
      The run as plain values, `precisions` among them.
    """
    splits = make_splits(config, dataset)
    task = make_task(config, policy, splits)
    run, state = train_policy(EXPERIMENT, task, config, policy, directory)
    with translate_os_errors(directory):
        write_weights(directory / WEIGHTS, state.params, architecture="DeepConvNet")
    rows = evaluate(config, state.params, policy, splits.test)
    return {**run, "num_epochs": config.num_epochs, "precisions": rows}


def make_splits(config: Config, dataset: ImageDataset) -> Splits:
    """Holds out the last training images.

    Raises:
      ConfigError: if that leaves no image to train on.
    """
    return split(
        dataset,
        len(dataset.x_train) - config.num_val,
        batch_size=config.batch_size,
        flag=f"--num-val {config.num_val}",
    )


def make_task(config: Config, policy: str, splits: Splits) -> Task:
    """Returns what one policy trains."""
    num_steps = splits.train.num_batches * config.num_epochs
    return classification.make_task(
        DeepConvNet(),
        splits,
        optax.adam(one_cycle(config.learning_rate, num_steps)),
        policy,
        autocast=config.autocast,
        seed=config.seed,
        num_epochs=config.num_epochs,
        has_dropout=True,
    )


def evaluate(
    config: Config, params: Any, policy: str, test_set: DeviceDataset
) -> list[dict[str, Any]]:
    """Returns the rows of `precisions.evaluate` on the test images."""
    batches = [
        (b["image"][b["mask"]], b["label"][b["mask"]]) for b in test_set.in_order()
    ]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    names = config.precision_names()
    params = jax.device_get(params)
    rows = precisions.evaluate(DeepConvNet(), params, images, labels, names)
    return [{"policy": policy, **row} for row in rows]
