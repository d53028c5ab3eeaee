"""The loss of SSD and its hard negatives, against slow oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.models.ssd.loss import (
    LossSums,
    hard_negatives,
    multibox_sums,
    normalize,
    smooth_l1,
)
from experiments.models.ssd.matching import Targets

NUM_IMAGES, NUM_ANCHORS, NUM_CLASSES = 2, 10, 3
SHAPE = (NUM_IMAGES, NUM_ANCHORS)
LOSSES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=20, max_size=20)
MATCHES = st.lists(st.sampled_from([0, 0, 0, 1]), min_size=20, max_size=20)
mined = jax.jit(hard_negatives)


def slow_negatives(losses, is_match):
    """Three negatives per match of an image, those of the largest loss."""
    chosen = np.zeros(len(losses), bool)
    negatives = [i for i in range(len(losses)) if not is_match[i]]
    negatives.sort(key=lambda i: -losses[i])  # stable: of equal ones the first
    chosen[negatives[: 3 * int(np.sum(is_match))]] = True
    return chosen


def log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits)))


def slow_sums(offsets, logits, classes, wanted):
    """The sums of the losses, a default box after the other, in float64."""
    localization = confidence = 0.0
    for image in range(NUM_IMAGES):
        rows = list(zip(logits[image], classes[image], strict=True))
        losses = [-log_softmax(np.float64(row))[label] for row, label in rows]
        is_match = classes[image] > 0
        negatives = slow_negatives(np.float32(losses), is_match)
        confidence += sum(np.array(losses)[is_match | negatives])
        for error in np.float64(offsets - wanted)[image][is_match].ravel():
            small = abs(error) < 1
            localization += error**2 / 2 if small else abs(error) - 0.5
    return localization, confidence


@given(LOSSES, MATCHES)
def test_negatives_are_the_hardest_of_each_image(losses, matches):
    losses = np.float32(losses).reshape(SHAPE)
    is_match = np.array(matches, bool).reshape(SHAPE)
    expected = [slow_negatives(*row) for row in zip(losses, is_match, strict=True)]
    np.testing.assert_array_equal(mined(losses, is_match), expected)


def random_outputs(seed, share=0.3):
    rng = np.random.default_rng(seed)
    offsets = 2 * rng.normal(size=(*SHAPE, 4)).astype(np.float32)
    logits = 2 * rng.normal(size=(*SHAPE, NUM_CLASSES + 1)).astype(np.float32)
    wanted = 2 * rng.normal(size=(*SHAPE, 4)).astype(np.float32)
    classes = rng.integers(1, NUM_CLASSES + 1, SHAPE) * (rng.random(SHAPE) < share)
    return offsets, logits, Targets(classes.astype(np.int32), wanted)


sums_of = jax.jit(multibox_sums)


@given(st.integers(0, 2**32 - 1))
def test_sums_are_those_of_the_default_boxes_that_count(seed):
    offsets, logits, targets = random_outputs(seed)
    sums = sums_of(offsets, logits, targets)
    expected = slow_sums(offsets, logits, targets.classes, targets.offsets)
    np.testing.assert_allclose(sums[:2], expected, rtol=1e-4, atol=1e-5)
    assert int(sums.num_matches) == np.sum(targets.classes > 0)
    assert int(sums.num_anchors) == 20


def test_smooth_l1_is_that_of_fast_r_cnn():
    x = jnp.array([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    expected = [2.5, 0.5, 0.125, 0.0, 0.125, 0.5, 2.5]
    np.testing.assert_allclose(smooth_l1(x), expected)


def total(outputs, targets, normalization="matches"):
    sums = multibox_sums(*outputs, targets)
    return normalize(sums, sums.localization + sums.confidence, normalization)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_without_objects_the_loss_is_zero_and_its_gradients_finite(dtype):
    offsets, logits, targets = random_outputs(0, share=0.0)
    outputs = tuple(jnp.asarray(x, dtype) for x in (offsets, logits))
    loss, grads = jax.jit(jax.value_and_grad(total))(outputs, targets)
    assert (float(loss), loss.dtype) == (0.0, jnp.float32)
    for grad in grads:
        np.testing.assert_array_equal(grad, np.zeros_like(grad))


def test_most_gradients_are_zero_and_the_others_are_per_match():
    """What section 3.2 of the mixed-precision paper sees: zeros of mined negatives."""
    offsets, logits, targets = random_outputs(3, share=0.1)
    grads = jax.grad(total)((offsets, logits), targets)
    is_match = targets.classes > 0
    assert is_match.any()
    counts = np.any(grads[1] != 0, axis=-1)
    assert counts.sum() == np.minimum(is_match.sum(1) * 4, NUM_ANCHORS).sum()
    np.testing.assert_array_equal(grads[0][~is_match], 0)


def test_the_loss_is_per_match_or_per_default_box():
    sums = LossSums(*map(np.float32, (6.0, 2.0)), np.int32(4), np.int32(100))
    assert float(normalize(sums, sums.localization, "matches")) == 1.5
    assert float(normalize(sums, sums.confidence, "anchors")) == np.float32(0.02)
    assert float(normalize(sums, sums.localization, "matches", 0.5)) == 0.75
    with pytest.raises(ValueError, match="matches, anchors, got 'images'"):
        normalize(sums, sums.confidence, "images")


def test_an_overflow_where_nothing_matches_does_no_harm():
    offsets, logits, targets = random_outputs(1)
    offsets[targets.classes == 0] = np.inf
    loss, grads = jax.value_and_grad(total)((offsets, logits), targets)
    assert np.isfinite(loss)
    assert all(np.isfinite(grad).all() for grad in grads)
