"""Loss scaling on a single-shot detector: float32 beside mixed precision.

    python -m experiments.ssd_digits
    python -m experiments.ssd_digits --policy float32 --numerics --workdir RUN
    python -m experiments.ssd_digits --workdir RUN --predict a.png
    python -m experiments.ssd_digits --preset ssd300 --dataset voc --data-dir VOCdevkit

The detection evidence of "Mixed Precision Training" (arXiv:1710.03740, section 3.2), at
a size for a CPU. The network is an SSD (arXiv:1512.02325): a trunk like VGG's, default
boxes of several shapes on several feature maps, matching by overlap, hard negative
mining, and a loss divided by the number of matches. The images are digits of MNIST on a
canvas, several at a time, of several sizes, with noise and pieces of other digits.
--dataset voc and --dataset coco name real corpora (`pip install -e ".[detection]"`);
--preset ssd300 is the paper's size. --numerics counts and draws activation gradients,
as the paper's figure 3. Each policy leaves pictures of what it finds, and its trunk
for --init-weights.
"""

from experiments.configs.ssd_digits import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.ssd_digits", Config, doc=__doc__)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.data.detection.batches import DetectionBatches, count_objects
from experiments.data.detection.examples import DetectionDataset
from experiments.harness import results
from experiments.harness.experiment import Experiment, Metric, Task
from experiments.harness.files import translate_os_errors
from experiments.harness.gradient_report import report_gradients
from experiments.harness.output import count_text
from experiments.harness.report import report
from experiments.harness.results import Column, Result
from experiments.harness.training import train_policy
from experiments.harness.weights import read_weights, write_weights
from experiments.models.detection.detection import (
    Evaluation,
    Prepared,
    make_init,
    make_task,
)
from experiments.models.detection.pictures import draw_detections, draw_matches
from experiments.models.detection.prediction import keep_classes, predict
from experiments.models.optimizers import one_cycle
from experiments.models.ssd.network import SSD

NAME = "ssd_digits"
GRADIENTS_NAME = (
    f"{NAME}_gradients"  # what --numerics leaves, beside the table by layer
)
TRUNK = "trunk.safetensors"


def main(config: Config, dataset: DetectionDataset | None = None) -> Result | None:
    """Trains once per policy, compares, and leaves everything in the workdir.

    Args:
      config: the settings.
      dataset: the images, instead of those that the config names.

    Returns:
      The result; its runs have `test_map07`, `ap_by_class`, `ms_per_step`, ... None
      with `predict`.

    Raises:
      ExperimentError: for data, files or checkpoints that fail, or after a signal.
      NonFiniteTrainingError: if the gradients stay non-finite.
    """
    if config.predict:
        for prediction in predict(config, NAME):
            print(prediction, flush=True)
        return None
    dataset = dataset or config.load_images(config.architecture().image_size)
    experiment = make_experiment(has_coco=config.dataset == "coco")

    def train_one(config, policy, directory):
        return train(experiment, config, policy, dataset, directory)

    result = results.run_policies(NAME, config, train_one)
    epochs = count_text(config.num_epochs, "epoch")
    title = f"{dataset.name}, SSD {config.preset}, {epochs}"
    report(experiment, result, title)
    if config.numerics:
        report_gradients(GRADIENTS_NAME, result, title)
    return result


def make_experiment(*, has_coco: bool = False, name: str = NAME) -> Experiment:
    """Returns what is measured: COCO's AP, too, where images are COCO's."""
    metrics = [
        Metric("loss", "loss", is_larger_better=False),
        Metric("map07", "mAP (VOC07)", is_larger_better=True, format="{:.2%}"),
        Metric("map_area", "mAP (area)", is_larger_better=True, format="{:.2%}"),
    ]
    if has_coco:
        metrics.append(
            Metric("coco_ap", "AP (COCO)", is_larger_better=True, format="{:.2%}")
        )
    more = (Column("parameters", "num_parameters", "{:,}"),)
    more = (*more, Column("epochs", "num_epochs"))
    return Experiment(name, tuple(metrics), headline="map07", more_columns=more)


def train(
    experiment: Experiment,
    config: Config,
    policy: str,
    dataset: DetectionDataset,
    directory: Path,
) -> dict[str, Any]:
    """Trains in one policy; draws what it finds, and writes its trunk.

    Args:
      experiment: what is measured.
      config: the settings; its `workdir` is set.
      policy: the precision policy.
      dataset: the images.
      directory: where everything of this run goes.

    Returns:
      The run as plain values; `ap_by_class` has pairs of VOC07's AP and the area's.
    """
    assert config.workdir is not None  # set by `run_policies`
    with translate_os_errors(config.workdir):
        keep_classes(config.workdir, dataset.classes)
    model = SSD(len(dataset.classes), config.architecture())
    task, evaluation = make_tasks(config, policy, model, dataset)
    run, state = train_policy(experiment, task, config, policy, directory)
    by_class = {name: list(ap) for name, ap in evaluation.by_class.items()}
    evaluation(state, "val")
    title = f"{dataset.name}, {policy}"
    with translate_os_errors(directory):
        trunk = state.params["trunk"]
        write_weights(directory / TRUNK, trunk, architecture=f"SSD {config.preset}")
        found = evaluation.found
        draw_detections(directory / "found.png", title, dataset, found)
        title = f"{dataset.name}: default boxes that stand for objects"
        levels = model.architecture.levels()
        draw_matches(directory / "matches.png", title, dataset.val, levels)
    return {**run, "ap_by_class": by_class}


def make_tasks(
    config: Config, policy: str, model: SSD, dataset: DetectionDataset
) -> tuple[Task, Evaluation]:
    """Returns what one policy trains, and its evaluation."""
    data = prepare(config, dataset)
    evaluation = Evaluation(
        model,
        data,
        policy,
        autocast=config.autocast,
        normalization=config.normalization,
        loss_factor=config.loss_factor,
        has_coco=config.dataset == "coco",
    )
    task = make_task(
        model,
        data,
        make_tx(config, data.train.num_batches * config.num_epochs),
        evaluation,
        num_epochs=config.num_epochs,
        normalization=config.normalization,
        loss_factor=config.loss_factor,
        init=make_init_from(config, model),
        numerics_interval=config.numerics_interval if config.numerics else None,
    )
    return task, evaluation


def prepare(config: Config, dataset: DetectionDataset) -> Prepared:
    """Returns the images in batches of one shape."""
    max_objects = count_objects(dataset.train, dataset.val, dataset.test)
    options: dict[str, Any] = {
        "batch_size": config.batch_size,
        "max_objects": max_objects,
    }
    return Prepared(
        dataset,
        DetectionBatches(
            dataset.train,
            seed=config.seed,
            augmentation=config.augmentation(),
            **options,
        ),
        DetectionBatches(dataset.val, **options),
        DetectionBatches(dataset.test, **options),
    )


def make_init_from(config: Config, model: SSD) -> Callable[..., Any]:
    """Returns `key -> (params, None)`, with the trunk of `init_weights` if it is set.

    Raises:
      WeightsError: if the file is damaged, or holds other weights.
    """
    init = make_init(model)
    if config.init_weights is None:
        return init
    template, _ = jax.eval_shape(init, jax.random.key(0))
    trunk = jax.tree.map(
        jnp.asarray, read_weights(config.init_weights, template["trunk"])
    )

    def init_from(key):
        params, model_state = init(key)
        return {**params, "trunk": trunk}, model_state

    return init_from


def make_tx(config: Config, num_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer, with clipping, without loss scaling."""
    schedule = one_cycle(config.learning_rate, num_steps)
    optimizers = {
        "adam": optax.adam(schedule),
        "sgd": optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(schedule, momentum=config.momentum, nesterov=True),
        ),
    }
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optimizers[config.optimizer]
    )
