"""What a trained run finds in images of any size."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mpjax
from experiments.configs.ssd_digits import NETWORK, Config
from experiments.data.detection.batches import normalize_images
from experiments.data.detection.files import read_image
from experiments.harness.errors import WorkdirError
from experiments.harness.files import read_json, translate_os_errors, write_json
from experiments.harness.plot_style import write_png
from experiments.harness.trained import (
    check_settings,
    chosen_policies,
    open_trained,
    own_settings,
    shapes,
)
from experiments.models.detection.average_precision import Found
from experiments.models.detection.detection import make_eval_step, make_init, to_found
from experiments.models.detection.pictures import MIN_SCORE, draw_prediction
from experiments.models.ssd.network import SSD

CLASSES = "classes.json"
DIRECTORY = "predictions"
_FREE = ("policies", "policy")  # what a prediction may choose
_SHOWN_SIZE = 512  # pixels of the image in the picture


class Prediction(NamedTuple):
    """What is found in an image.

    Attributes:
      file: the image.
      policy: the policy whose weights find it, and that they compute in.
      step: how many steps they were trained for.
      found: all detections.
      classes: names of the classes.
      picture: the PNG that shows them.
    """

    file: Path
    policy: str
    step: int
    found: Found
    classes: tuple[str, ...]
    picture: Path

    def __str__(self) -> str:
        pairs = zip(self.found.labels, self.found.scores, strict=True)
        texts = [
            f"{self.classes[label - 1]} {score:.2f}"
            for label, score in pairs
            if score >= MIN_SCORE
        ]
        return (
            f"{self.file}, {self.policy} after {self.step} steps: "
            f"{', '.join(texts) or 'nothing'} ({self.picture})"
        )


def predict(config: Config, experiment: str) -> Iterator[Prediction]:
    """Yields what each policy of a run finds, and draws it below the run's directory.

    The network and the newest checkpoint of each policy are read from the run.

    Args:
      config: names the run, as `workdir`, and the images. `policy` or `policies` choose
        some of those that are trained.
      experiment: the experiment that must have written the run.

    Raises:
      WorkdirError: if there is no such run, or a picture cannot be written.
      ConfigError: if a setting contradicts the run.
      ExampleError: if an image cannot be read.
      CheckpointError: if the run has no checkpoint.
    """
    assert config.workdir is not None  # checked with the flags
    run = open_trained(config.workdir, experiment)
    names = [name for name in config.comparable() if name not in _FREE]
    check_settings(config, run, names)
    policies = chosen_policies(config, run)
    config = dataclasses.replace(config, **own_settings(run, NETWORK))
    classes = read_classes(run.path)
    model = SSD(len(classes), config.architecture())
    template = shapes(make_init(model))
    size = model.architecture.image_size, model.architecture.num_channels
    images = [read_image(file, *size) for file in config.predict]
    for policy in policies:
        weights = run.weights(policy, template)
        eval_step = make_eval_step(model, policy, autocast=config.autocast)
        state = _as_state(weights.variables["params"])
        for file, image in zip(config.predict, images, strict=True):
            found = _find(eval_step, state, image)
            picture = _draw(run.path, file, policy, found, classes, size[1])
            yield Prediction(file, policy, weights.step, found, classes, picture)


def keep_classes(workdir: Path, classes: tuple[str, ...]) -> None:
    """Writes the names of the classes of a run.

    Raises:
      OSError: if they cannot be written.
    """
    write_json(workdir / CLASSES, list(classes))


def read_classes(workdir: Path) -> tuple[str, ...]:
    """Returns the names of the classes of a run.

    Raises:
      WorkdirError: if they are missing or damaged.
    """
    file = workdir / CLASSES
    names = read_json(file)
    if not isinstance(names, list) or not all(isinstance(x, str) for x in names):
        raise WorkdirError(f"{file} is damaged: expected the names of classes.")
    return tuple(names)


def _find(eval_step, state: mpjax.TrainState, image: np.ndarray) -> Found:
    pixels = jnp.asarray(image, jnp.float32)[None] / 255
    batch = {
        "image": normalize_images(pixels),
        "boxes": jnp.zeros((1, 1, 4)),
        "labels": jnp.zeros((1, 1), jnp.int32),
        "mask": jnp.zeros((1, 1), bool),
    }
    detections, _ = eval_step(state, batch)
    return to_found(detections)[0]


def _draw(
    workdir: Path,
    file: Path,
    policy: str,
    found: Found,
    classes: tuple[str, ...],
    num_channels: int,
) -> Path:
    directory = workdir / DIRECTORY
    picture = directory / f"{file.stem}-{policy}.png"
    shown = read_image(file, _SHOWN_SIZE, num_channels)
    figure = draw_prediction(f"{file.name}, {policy}", shown, found, classes)
    with translate_os_errors(directory):
        directory.mkdir(exist_ok=True)
        write_png(picture, figure)
    return picture


def _as_state(params) -> mpjax.TrainState:
    return mpjax.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.asarray, params),
        opt_state=None,
        model_state=None,
        ema_params=None,
        key=None,
    )
