"""Boxes, their overlaps and offsets, and default boxes, against slow oracles."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from helpers import detection_runs
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.detection.boxes import overlaps, to_centers, to_corners
from experiments.models.ssd.anchors import Level, default_boxes, level_of
from experiments.models.ssd.architecture import PRESETS
from experiments.models.ssd.offsets import decode, encode

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS)
def test_overlaps_are_those_of_each_pair(seed):
    rng = np.random.default_rng(seed)
    a, b = (detection_runs.random_boxes(rng, num) for num in (6, 4))
    b[0, 2:] = b[0, :2]  # without area
    expected = [[detection_runs.overlap(x, y) for y in b] for x in a]
    np.testing.assert_allclose(jax.jit(overlaps)(a, b), expected, atol=1e-6)


def test_padding_overlaps_nothing_not_even_itself():
    nothing = np.zeros((2, 4), np.float32)
    np.testing.assert_array_equal(overlaps(nothing, nothing), np.zeros((2, 2)))


@given(SEEDS)
def test_offsets_lead_back_to_the_box(seed):
    rng = np.random.default_rng(seed)
    boxes, others = (detection_runs.random_boxes(rng, 5) for _ in range(2))
    anchors = np.asarray(to_centers(others))
    offsets = jax.jit(encode)(boxes, anchors)
    np.testing.assert_allclose(jax.jit(decode)(offsets, anchors), boxes, atol=1e-5)
    np.testing.assert_allclose(to_corners(to_centers(boxes)), boxes, atol=1e-6)


def test_offsets_are_those_of_the_paper():
    """Section 2.2, equation 2, divided by the variances of its code."""
    anchor, box = np.float32([0.5, 0.5, 0.2, 0.4]), np.float32([0.5, 0.4, 0.7, 0.8])
    expected = [0.1 / 0.2 / 0.1, 0.1 / 0.4 / 0.1, 0.0, 0.0]
    np.testing.assert_allclose(encode(box, anchor), expected, atol=1e-5)
    wider = np.float32([0.3, 0.3, 0.7, 0.7])
    expected = [0, 0, math.log(2) / 0.2, 0]
    np.testing.assert_allclose(encode(wider, anchor), expected, atol=1e-5)
    assert np.isfinite(encode(np.zeros(4, np.float32), anchor)).all()


def test_default_boxes_are_in_the_order_of_the_outputs():
    levels = [Level(2, 0.4, 0.9, (2.0,)), Level(1, 0.9, 1.0, ())]
    boxes = default_boxes(levels)
    assert boxes.shape == (2 * 2 * 4 + 2, 4)
    between, root = math.sqrt(0.4 * 0.9), math.sqrt(2)
    expected = [
        [0.75, 0.25, 0.4, 0.4],
        [0.75, 0.25, between, between],
        [0.75, 0.25, 0.4 * root, 0.4 / root],
        [0.75, 0.25, 0.4 / root, 0.4 * root],
    ]
    np.testing.assert_allclose(boxes[4:8], expected, rtol=1e-6)
    np.testing.assert_allclose(boxes[16], [0.5, 0.5, 0.9, 0.9], rtol=1e-6)
    assert level_of(levels).tolist() == [0] * 16 + [1] * 2


def test_the_papers_network_has_its_number_of_default_boxes():
    levels = PRESETS["ssd300"].levels()
    assert [level.size for level in levels] == [38, 19, 10, 5, 3, 1]
    assert [level.boxes_per_place for level in levels] == [4, 6, 6, 6, 4, 4]
    assert len(default_boxes(levels)) == 8732


def test_images_that_are_too_small_are_refused():
    small = dataclasses.replace(PRESETS["ssd300"], image_size=96)
    with pytest.raises(ValueError, match="images of 96 pixels are too small"):
        small.levels()
