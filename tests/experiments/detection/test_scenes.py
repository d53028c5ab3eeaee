"""Digits on a canvas: seeded by index, with boxes that fit."""

import dataclasses

import numpy as np
import pytest
from helpers import detection_runs

from experiments.data.detection.scenes import CLASSES, CLUTTER, make_dataset
from experiments.data.detection.scenes_config import ScenesConfig
from experiments.data.mnist import ImageDataset
from experiments.harness.errors import ConfigError


def config(**changes):
    return ScenesConfig(**{"num_train": 12, "num_test": 4, "seed": 3, **changes})


def all_of(split):
    return split.read(np.arange(len(split.annotations)))


def test_a_scene_is_a_function_of_its_seed_and_index():
    few = detection_runs.dataset(config(), image_size=64)
    more = detection_runs.dataset(config(num_train=20), image_size=64)
    np.testing.assert_array_equal(all_of(few.train), all_of(more.train)[:12])
    pairs = zip(few.train.annotations, more.train.annotations[:12], strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.labels, b.labels)
    other = detection_runs.dataset(config(seed=4), image_size=64)
    assert (all_of(few.train) != all_of(other.train)).any()
    assert (all_of(few.train)[:3] != all_of(few.val)).any()


@pytest.mark.parametrize("difficulty", CLUTTER)
def test_boxes_hold_the_digits(difficulty):
    dataset = detection_runs.dataset(config(difficulty=difficulty), image_size=64)
    assert dataset.classes == CLASSES
    assert difficulty in dataset.name
    nums = []
    for image, annotation in zip(
        all_of(dataset.train), dataset.train.annotations, strict=True
    ):
        nums.append(len(annotation.boxes))
        assert (annotation.boxes >= 0).all()
        assert (annotation.boxes <= 1).all()
        assert set(annotation.labels.tolist()) <= set(range(1, 11))
        if difficulty == "easy":
            pixels = image[..., 0] >= 64
            for left, top, right, bottom in np.round(annotation.boxes * 64).astype(int):
                part = pixels[top:bottom, left:right]
                assert part[0].any() & part[-1].any() & part.T[0].any()
                assert part.T[-1].any()
                pixels[top:bottom, left:right] = False
            assert not pixels.any()
    assert set(nums) <= {1, 2, 3}
    assert len(set(nums)) > 1


def test_each_split_has_digits_of_its_own():
    images = np.zeros((60, 28, 28), np.uint8)
    images[:, 4:24, 8:20] = 100  # to train on
    images[36:40, 4:24, 8:20] = 150  # the last tenth of 40
    images[40:, 4:24, 8:20] = 250
    labels = np.zeros(60, np.uint8)
    digits = ImageDataset(
        "blocks",
        "here",
        *(x[:40] for x in (images, labels)),
        *(x[40:] for x in (images, labels)),
    )
    dataset = make_dataset(config(difficulty="easy"), digits, num_val=9, image_size=64)
    largest = [int(all_of(split).max()) for split in dataset[3:]]
    assert largest == [100, 150, 250]


def test_settings_that_cannot_work_are_refused():
    for changes, message in (
        ({"max_digits": 0}, r"--scenes\.max-digits must be 1 or more, got 0"),
        ({"min_scale": 1.5}, r"--scenes\.max-scale must be --scenes\.min-scale or"),
        ({"num_train": 0}, r"--scenes\.num-train"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config(), **changes)
