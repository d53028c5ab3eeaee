"""Average precision by VOC's and COCO's rules, against slow oracles."""

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
from helpers import detection_runs
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.detection.examples import make_annotation
from experiments.harness.errors import DataError
from experiments.models.detection.average_precision import (
    Found,
    average_precisions,
    mean_over_classes,
)
from experiments.models.detection.coco_ap import coco_average_precision

NUM_CLASSES = 3
SIZE = (100, 50)


def slow_average_precision(found, annotations, label):
    """VOC's rules in exact fractions, one detection after the other; None without."""
    detections = sorted(
        (-score, image, box.tolist())
        for image, x in enumerate(found)
        for box, score, own in zip(*x, strict=True)
        if own == label
    )
    objects = [
        [
            (box.tolist(), bool(is_difficult))
            for box, own, is_difficult in zip(
                x.boxes, x.labels, x.is_difficult, strict=True
            )
            if own == label
        ]
        for x in annotations
    ]
    num = sum(not is_difficult for image in objects for _, is_difficult in image)
    if not num:
        return None
    taken, points, right, wrong = set(), [], 0, 0
    for _, image, box in detections:
        shares = [detection_runs.overlap(box, other) for other, _ in objects[image]]
        best = shares.index(max(shares)) if shares else None
        if best is None or shares[best] < 0.5 or (image, best) in taken:
            wrong += 1
        elif objects[image][best][1]:
            continue
        else:
            taken.add((image, best))
            right += 1
        points.append((Fraction(right, num), Fraction(right, right + wrong)))
    at = lambda recall: max((p for r, p in points if r >= recall), default=Fraction(0))
    eleven = sum(at(Fraction(i, 10)) for i in range(11)) / 11
    recalls = [Fraction(i, num) for i in range(num + 1)]
    area = sum(at(high) / num for high in recalls[1:])
    return eleven, area


@given(st.integers(0, 2**32 - 1))
def test_it_is_what_the_rules_say(seed):
    rng = np.random.default_rng(seed)
    annotations, found = detection_runs.random_truth(
        rng, num_images=6, num_classes=NUM_CLASSES
    )
    results = average_precisions(found, annotations, NUM_CLASSES)
    for label, ours in enumerate(results, start=1):
        expected = slow_average_precision(found, annotations, label)
        if expected is None:
            assert math.isnan(ours.voc07)
            assert math.isnan(ours.area)
        else:
            np.testing.assert_allclose(ours, [float(x) for x in expected], atol=1e-9)


def one_image(boxes, scores, *, flags=None, objects=((10, 10, 30, 30),), **options):
    """Evaluates detections (in pixels) in one image with objects of one class."""
    annotation = make_annotation(
        "image", SIZE, objects, [1] * len(objects), is_difficult=flags, **options
    )
    shares = np.float32(boxes).reshape(-1, 4) / np.float32(SIZE * 2)
    found = Found(shares, np.float32(scores), np.ones(len(shares), int))
    return [found], [annotation]


def test_a_second_detection_of_an_object_is_wrong():
    args = one_image([(10, 10, 30, 30), (11, 10, 30, 30)], [0.5, 0.9])
    (result,) = average_precisions(*args, 1)
    assert result == (1.0, 1.0)
    right_last = one_image([(60, 10, 80, 30), (10, 10, 30, 30)], [0.9, 0.5])
    (result,) = average_precisions(*right_last, 1)
    assert result == (0.5, 0.5)


@pytest.mark.parametrize("kind", ["difficult", "crowd"])
def test_a_detection_of_a_difficult_object_does_not_count(kind):
    objects = ((10, 10, 30, 30), (60, 10, 80, 30))
    flags = {"flags": [False, True]} if kind == "difficult" else {}
    flags |= {"is_crowd": [False, True]} if kind == "crowd" else {}
    boxes = [(60, 10, 80, 30), (61, 10, 80, 30), (10, 10, 30, 30)]
    args = one_image(boxes, [0.9, 0.8, 0.5], objects=objects, **flags)
    assert average_precisions(*args, 1) == [(1.0, 1.0)]
    assert average_precisions(*one_image([], [], objects=objects, **flags), 1) == [
        (0.0, 0.0)
    ]


def test_classes_without_objects_are_in_no_mean():
    assert mean_over_classes([0.25, float("nan"), 0.75]) == 0.5
    assert math.isnan(mean_over_classes([float("nan")]))


def test_cocos_precision_is_stricter_and_ignores_crowds():
    exact = one_image([(10, 10, 30, 30)], [0.9])
    values = coco_average_precision(*exact, 1)
    assert list(values) == ["ap", "ap50", "ap75"]
    np.testing.assert_allclose(list(values.values()), 1)
    near = one_image([(10, 10, 30, 22.1)], [0.9])  # an overlap of 0.605
    values = coco_average_precision(*near, 1)
    np.testing.assert_allclose(list(values.values()), [0.3, 1.0, 0.0], atol=1e-9)
    objects = ((10, 10, 30, 30), (40, 0, 100, 50))
    boxes = [(50, 10, 70, 30), (10, 10, 30, 30)]
    crowd = one_image(boxes, [0.9, 0.5], objects=objects, is_crowd=[False, True])
    assert coco_average_precision(*crowd, 1)["ap"] == pytest.approx(1)
    nothing = one_image([], [], objects=())
    assert math.isnan(coco_average_precision(*nothing, 1)["ap"])


def test_cocos_precision_at_half_is_near_vocs_area():
    rng = np.random.default_rng(1)
    annotations, found = detection_runs.random_truth(
        rng, num_images=60, num_classes=2, flags=False
    )
    ours = average_precisions(found, annotations, 2)
    theirs = coco_average_precision(found, annotations, 2)["ap50"]
    np.testing.assert_allclose(theirs, np.mean([x.area for x in ours]), atol=0.05)


def test_without_pycocotools_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(DataError, match=r'pip install -e "\.\[detection\]"'):
        coco_average_precision(*one_image([], []), 1)
