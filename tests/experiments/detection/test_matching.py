"""Which default boxes stand for which objects, against a slow oracle."""

import jax
import numpy as np
from helpers import detection_runs
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.detection.boxes import to_centers
from experiments.models.ssd.matching import THRESHOLD, make_targets, match
from experiments.models.ssd.offsets import encode

NUM_ANCHORS, NUM_OBJECTS = 12, 4
# Few values, so that many overlaps are equal; 0.5 itself is not enough.
SHARES = st.lists(
    st.sampled_from([0.0, 0.125, 0.3, 0.5, 0.51, 0.7, 0.9]),
    min_size=NUM_ANCHORS * NUM_OBJECTS,
    max_size=NUM_ANCHORS * NUM_OBJECTS,
)
MASKS = st.lists(st.booleans(), min_size=NUM_OBJECTS, max_size=NUM_OBJECTS)
matched = jax.jit(match)


def slow_match(shares, mask):
    """The rules in words, one default box and one object after the other."""
    anchors, objects = range(len(shares)), np.flatnonzero(mask).tolist()
    matches = []
    for anchor in anchors:
        best = max(objects, key=lambda m: shares[anchor][m], default=-1)
        is_enough = best >= 0 and shares[anchor][best] > THRESHOLD
        matches.append(best if is_enough else -1)
    free_anchors, free_objects = set(anchors), set(objects)
    while free_anchors and free_objects:
        pairs = [(a, m) for a in sorted(free_anchors) for m in sorted(free_objects)]
        anchor, wanted = max(pairs, key=lambda pair: shares[pair[0]][pair[1]])
        if shares[anchor][wanted] <= 0:
            break
        matches[anchor] = wanted
        free_anchors.remove(anchor)
        free_objects.remove(wanted)
    return matches


@given(SHARES, MASKS)
def test_matches_are_those_of_the_rules(values, mask):
    shares = np.float32(values).reshape(NUM_ANCHORS, NUM_OBJECTS)
    found = matched(shares, np.array(mask))
    assert found.tolist() == slow_match(shares, mask)


@given(SHARES, MASKS)
def test_every_object_has_a_default_box_of_its_own(values, mask):
    shares = np.maximum(np.float32(values), 0.01).reshape(NUM_ANCHORS, NUM_OBJECTS)
    found = set(matched(shares, np.array(mask)).tolist())
    assert found - {-1} == set(np.flatnonzero(mask).tolist())


def test_targets_are_classes_and_offsets_of_the_matched_objects():
    rng = np.random.default_rng(0)
    boxes = detection_runs.random_boxes(rng, NUM_OBJECTS)
    anchors = np.array(to_centers(detection_runs.random_boxes(rng, NUM_ANCHORS)))
    anchors[0] = np.asarray(to_centers(boxes[2]))
    labels, mask = np.int32([3, 1, 7, 2]), np.array([True, True, True, False])
    targets = jax.jit(make_targets)(anchors, boxes, labels, mask)
    assert targets.classes[0] == 7
    np.testing.assert_allclose(targets.offsets[0], 0, atol=1e-5)
    assert set(np.unique(targets.classes).tolist()) <= {0, 1, 3, 7}
    assert targets.classes.dtype == np.int32
    (first,) = np.flatnonzero(targets.classes == 3)[:1]
    expected = encode(boxes[0], anchors[first])
    np.testing.assert_allclose(targets.offsets[first], expected, rtol=1e-5)


def test_an_image_without_objects_is_background():
    nothing = np.zeros((NUM_ANCHORS, NUM_OBJECTS), np.float32)
    assert set(matched(nothing, np.zeros(NUM_OBJECTS, bool)).tolist()) == {-1}
