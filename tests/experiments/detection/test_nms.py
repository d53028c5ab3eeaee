"""Non-maximum suppression and detections, against slow oracles."""

import jax
import numpy as np
from helpers import detection_runs
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.detection.boxes import to_centers
from experiments.models.detection.detection import to_found
from experiments.models.ssd.nms import MAX_OVERLAP, MIN_SCORE, detect, suppress
from experiments.models.ssd.offsets import decode

NUM_BOXES, NUM_CLASSES = 12, 2
SEEDS = st.integers(0, 2**32 - 1)
kept = jax.jit(suppress)
detected = jax.jit(detect)


def slow_suppress(boxes):
    keep = []
    for index, box in enumerate(boxes):
        overlaps = [detection_runs.overlap(boxes[other], box) for other in keep]
        if all(share <= MAX_OVERLAP for share in overlaps):
            keep.append(index)
    return keep


@given(SEEDS)
def test_what_is_kept_is_what_no_better_box_overlaps(seed):
    boxes = detection_runs.random_boxes(np.random.default_rng(seed), NUM_BOXES, grid=4)
    scores = np.linspace(1, 0.1, NUM_BOXES).astype(np.float32)
    assert np.flatnonzero(kept(boxes, scores)).tolist() == slow_suppress(boxes)


@given(SEEDS)
def test_detections_are_those_of_each_class_best_first(seed):
    rng = np.random.default_rng(seed)
    anchors = np.asarray(to_centers(detection_runs.random_boxes(rng, NUM_BOXES)))
    offsets = rng.normal(size=(2, NUM_BOXES, 4)).astype(np.float32)
    logits = 3 * rng.normal(size=(2, NUM_BOXES, NUM_CLASSES + 1)).astype(np.float32)
    found = to_found(jax.device_get(detected(offsets, logits, anchors)))
    for image in range(2):
        boxes = np.clip(decode(offsets[image], anchors), 0, 1)
        shares = np.exp(logits[image]) / np.exp(logits[image]).sum(-1, keepdims=True)
        expected = []
        for label in range(1, NUM_CLASSES + 1):
            order = np.argsort(-shares[:, label], kind="stable")
            keep = order[slow_suppress(boxes[order].tolist())]
            expected += [(shares[i, label], label, i) for i in keep]
        expected = sorted((e for e in expected if e[0] > MIN_SCORE), reverse=True)
        ours = found[image]
        np.testing.assert_allclose(ours.scores, [e[0] for e in expected], rtol=1e-5)
        assert ours.labels.tolist() == [label for _, label, _ in expected]
        wanted = boxes[[i for *_, i in expected]].reshape(-1, 4)
        np.testing.assert_allclose(ours.boxes, wanted, atol=1e-6)


def test_only_the_best_are_given_and_the_rest_is_padding():
    anchors = np.asarray(to_centers(np.float32([[0, 0, 0.4, 0.4], [0.5, 0.5, 1, 1]])))
    logits = np.float32([[[0, 5, 0], [0, 0, 6]]])
    found = detect(np.zeros((1, 2, 4)), logits, anchors, max_detections=3)
    assert found.labels.tolist() == [[2, 1, 0]]
    single = detect(np.zeros((1, 2, 4)), logits, anchors, max_detections=1)
    assert single.labels.tolist() == [[2]]
    np.testing.assert_allclose(single.boxes[0, 0], [0.5, 0.5, 1, 1], atol=1e-6)
    nothing = np.float32([[[20, 0, 0], [20, 0, 0]]])
    assert not detect(np.zeros((1, 2, 4)), nothing, anchors).labels.any()
