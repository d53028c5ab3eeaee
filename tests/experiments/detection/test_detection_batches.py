"""Batches of annotated images: order, resumption, shards, padding, augmentation."""

import itertools

import jax
import numpy as np
import pytest
from helpers.tools import assert_same_bits
from PIL import Image

from experiments.data.dataset import Dataset
from experiments.data.detection import augment
from experiments.data.detection.augment import Augmentation, Sample
from experiments.data.detection.batches import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    DetectionBatches,
    count_objects,
    normalize_images,
)
from experiments.data.detection.files import ImageFiles
from experiments.harness.errors import ConfigError

ALL = Augmentation(photometric=True, crop=True, flip=True)


def batches(scenes, **changes):
    options = {"batch_size": 4, "max_objects": 3, "seed": 5, **changes}
    return DetectionBatches(scenes.train, **options)


@pytest.mark.parametrize(
    "augmentation",
    [
        pytest.param(None, id="plain"),
        pytest.param(ALL, id="augmented", marks=pytest.mark.slow),
    ],
)
def test_it_is_a_data_set_that_can_be_resumed_and_shared(scenes, augmentation):
    whole = batches(scenes, augmentation=augmentation)
    assert isinstance(whole, Dataset)
    expected = list(itertools.islice(whole, 5))
    state = whole.get_state()
    again = batches(scenes, augmentation=augmentation)
    again.set_state({"num_batches": 2})
    parts = [again.shard(index, 2) for index in range(2)]
    for batch in expected[2:]:
        assert_same_bits(next(again), batch)
        halves = [next(part) for part in parts]
        joined = jax.tree.map(lambda *x: np.concatenate(x), *halves)
        assert_same_bits(joined, jax.device_get(batch))
    assert again.get_state() == state == {"num_batches": 5}
    with pytest.raises(ConfigError, match="3 processes cannot share a batch of 4 imag"):
        again.shard(0, 3)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(scenes):
    data = batches(scenes)
    assert (data.num_batches, data.image_shape) == (2, (16, 16, 1))
    images = scenes.train.read(np.arange(8))

    def epoch():
        rows = np.concatenate([next(data)["image"] for _ in range(2)])
        return [int(np.argmin(np.abs(images / 255 - r).sum((1, 2, 3)))) for r in rows]

    first, second = epoch(), epoch()
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_a_batch_holds_images_and_padded_objects(scenes):
    data = DetectionBatches(scenes.test, batch_size=4, max_objects=3)
    (first, num_first), (last, num_last) = data.in_order()
    assert (num_first, num_last) == (4, 1)
    np.testing.assert_allclose(first["image"], scenes.test.read(np.arange(4)) / 255)
    for row, annotation in enumerate(scenes.test.annotations[:4]):
        num = len(annotation.boxes)
        assert first["mask"][row].tolist() == [True] * num + [False] * (3 - num)
        np.testing.assert_array_equal(first["boxes"][row, :num], annotation.boxes)
        np.testing.assert_array_equal(first["labels"][row, :num], annotation.labels)
    assert not np.asarray(last["mask"][1:]).any()
    assert not np.asarray(last["image"][1:]).any()


def test_colours_are_normalized_and_gray_is_not():
    gray = np.full((1, 2, 2, 1), 0.5, np.float32)
    np.testing.assert_array_equal(normalize_images(gray), gray)
    pixel = np.float32(IMAGENET_MEAN) + 2 * np.float32(IMAGENET_DEVIATION)
    np.testing.assert_allclose(normalize_images(pixel), [2, 2, 2], rtol=1e-5)


def test_the_objects_of_all_splits_are_counted(scenes):
    counts = [len(x.boxes) for split in scenes[3:] for x in split.annotations]
    assert count_objects(*scenes[3:]) == max(counts) == 2


def test_images_in_files_are_read_ahead_and_the_same(scenes, tmp_path):
    annotations = []
    for index, annotation in enumerate(scenes.train.annotations):
        file = tmp_path / f"{index}.png"
        Image.fromarray(scenes.train.read(np.array([index]))[0, ..., 0]).save(file)
        annotations.append(annotation._replace(name=str(file)))
    files = ImageFiles(annotations, {}, image_size=16, num_channels=1)
    ours = DetectionBatches(files, batch_size=4, max_objects=3, seed=5)
    ours.set_state({"num_batches": 1})
    expected = list(itertools.islice(batches(scenes), 4))
    for batch in expected[1:]:
        assert_same_bits(next(ours), batch)
    assert ours.get_state() == {"num_batches": 4}


# Augmentation.


def sample(size=8):
    """Returns an image whose pixels are their place, with two objects and padding."""
    places = np.arange(size * size, dtype=np.float32) / size**2
    boxes = np.float32([[0, 0, 0.5, 0.5], [0.5, 0.25, 1, 1], [0, 0, 0, 0]])
    mask = np.array([True, True, False])
    return Sample(places.reshape(size, size, 1), boxes, mask)


def test_a_mirror_image_has_mirrored_boxes():
    flipped = augment.flip(sample())
    np.testing.assert_array_equal(flipped.image[:, 0], sample().image[:, 7])
    expected = [[0.5, 0, 1, 0.5], [0, 0.25, 0.5, 1]]
    np.testing.assert_allclose(flipped.boxes[:2], expected)
    twice = augment.flip(flipped)
    np.testing.assert_array_equal(twice.boxes, sample().boxes)


def test_a_crop_shows_the_window_and_cuts_boxes_off():
    window = np.float32([0.5, 0, 1, 0.5])  # the upper right
    cropped = jax.jit(augment.crop)(sample(), window)
    assert cropped.image.shape == (8, 8, 1)
    # Every other pixel of the result is between two of the image.
    means = np.asarray(cropped.image).reshape(4, 2, 4, 2).mean((1, 3))
    np.testing.assert_allclose(means[1:3, 1:3], sample().image[1:3, 5:7, 0], atol=1e-5)
    # The first object's center is at the window's edge, the second's below it.
    assert cropped.mask.tolist() == [False, False, False]
    lower = jax.jit(augment.crop)(sample(), np.float32([0.25, 0.5, 1, 1]))
    assert lower.mask.tolist() == [False, True, False]
    np.testing.assert_allclose(lower.boxes[1], [1 / 3, 0, 1, 1], atol=1e-6)


def test_around_the_image_it_is_grey():
    wider = jax.jit(augment.crop)(sample(), np.float32([-0.5, -0.5, 1.5, 1.5]))
    assert wider.mask.tolist() == [True, True, False]
    np.testing.assert_allclose(wider.boxes[0], [0.25, 0.25, 0.5, 0.5])
    np.testing.assert_allclose(wider.image[0], sample().image.mean(), atol=1e-6)
    np.testing.assert_allclose(wider.image.mean(), sample().image.mean(), atol=0.02)


def test_windows_are_the_whole_a_larger_one_or_one_that_overlaps_an_object():
    keys = jax.random.split(jax.random.key(0), 60)
    choose = jax.jit(jax.vmap(augment.choose_window, in_axes=(0, None)))
    windows = np.asarray(choose(keys, sample()))
    sizes = windows[:, 2:] - windows[:, :2]
    is_whole = (windows == [0, 0, 1, 1]).all(1)
    is_outer = (sizes > 1).any(1)
    assert is_whole.sum() > 8
    assert is_outer.sum() > 8
    inner = ~(is_whole | is_outer)
    assert inner.sum() > 3
    assert (windows[inner] >= 0).all()
    assert (windows[inner] <= 1.00001).all()
    assert (windows[is_outer, :2] <= 0).all()
    assert (windows[is_outer, 2:] >= 1 - 1e-5).all()


def test_augmented_images_keep_their_range_and_their_boxes(scenes):
    plain, changed = (
        list(itertools.islice(batches(scenes, augmentation=a), 2)) for a in (None, ALL)
    )
    for before, after in zip(plain, changed, strict=True):
        assert (before["image"] != after["image"]).any()
        image, boxes = np.asarray(after["image"]), np.asarray(after["boxes"])
        assert image.min() >= -1e-5
        assert image.max() <= 1 + 1e-5
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert not (np.asarray(after["mask"]) & ~np.asarray(before["mask"])).any()
