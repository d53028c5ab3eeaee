"""A tiny detector, tiny scenes, and short runs of `ssd_digits`."""

import contextlib

import numpy as np
import pytest
from helpers.cli_runs import compiled_once

from experiments import ssd_digits
from experiments.data.detection import scenes
from experiments.data.detection.examples import make_annotation
from experiments.data.detection.scenes_config import ScenesConfig
from experiments.data.mnist import ImageDataset
from experiments.models.detection.average_precision import Found
from experiments.models.ssd import architecture
from experiments.models.ssd.architecture import Architecture, Extra

TINY = Architecture(
    image_size=16,
    num_channels=1,
    stages=((4,), (4,)),
    head_stages=(1,),
    fc_channels=None,
    extras=(Extra(4, 4),),
    scales=(0.3, 0.5, 0.8),
    aspect_ratios=((2.0,), (2.0,)),
)
SCENES = ScenesConfig(num_train=8, num_test=5, max_digits=2, difficulty="easy")


def digits(num=40, num_test=20):
    """Bars and blocks of 28 pixels, with labels of their own."""
    rng = np.random.default_rng(0)

    def some(size):
        y = rng.integers(0, 10, size).astype(np.uint8)
        x = np.zeros((size, 28, 28), np.uint8)
        for image, label in zip(x, y, strict=True):
            image[4:24, 4 : 6 + 2 * label] = 200 + label
        return x, y

    return ImageDataset("bars", "the tests", *some(num), *some(num_test))


def dataset(config=SCENES, **changes):
    options = {"num_val": 3, "image_size": TINY.image_size, **changes}
    return scenes.make_dataset(config, digits(), **options)


def settings(workdir, **changes):
    given = {
        "policies": "float32",
        "num_epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "workdir": workdir,
    }
    return ssd_digits.Config(**(given | changes))


@contextlib.contextmanager
def tiny_network():
    """Puts the tiny network in the place of the small preset."""
    with pytest.MonkeyPatch.context() as patch, compiled_once():
        patch.setitem(architecture.PRESETS, "small", TINY)
        yield


@contextlib.contextmanager
def without_pictures():
    """Leaves out what is drawn after a training."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("report", "draw_detections", "draw_matches"):
            patch.setattr(ssd_digits, name, lambda *_: None)
        yield


def random_boxes(rng, num, *, grid=8):
    """Returns boxes on a grid, so that overlaps are often equal, (num, 4) float32."""
    corners = np.sort(rng.integers(0, grid + 1, (num, 2, 2)), axis=1)
    corners[:, 1] = np.maximum(corners[:, 1], corners[:, 0] + 1)
    return (corners.reshape(num, 4) / grid).astype(np.float32)


def overlap(a, b):
    """Intersection over union of two boxes, in Python numbers."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    union = area(a) + area(b) - shared
    return shared / union if union > 0 else 0.0


def random_truth(rng, *, num_images, num_classes, flags=True):
    """Returns annotations and detections, some of them near the objects."""
    annotations, found = [], []
    for index in range(num_images):
        num = int(rng.integers(0, 4))
        boxes, labels = random_boxes(rng, num), rng.integers(1, num_classes + 1, num)
        difficult = rng.random(num) < 0.3 if flags else np.zeros(num, bool)
        annotations.append(
            make_annotation(
                str(index), (8, 8), boxes * 8, labels, is_difficult=difficult
            )
        )
        near = boxes + rng.choice([0, 0, 1 / 16], boxes.shape).astype(np.float32)
        more = random_boxes(rng, int(rng.integers(0, 4)))
        both = np.concatenate([near, near[:1], more])
        wrong = rng.integers(1, num_classes + 1, len(both) - num)
        scores = rng.permutation(np.arange(1, len(both) + 1) / 16 + index / 997)
        found.append(Found(both, scores, np.concatenate([labels, wrong])))
    return annotations, found
