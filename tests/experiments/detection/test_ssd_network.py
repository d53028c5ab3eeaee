"""The network of SSD: shapes, pooling, and gradients in half."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import detection_runs

import mpjax
from experiments.models.detection.detection import make_init, make_loss_fn
from experiments.models.pooling import max_filter, max_pool
from experiments.models.ssd.anchors import default_boxes
from experiments.models.ssd.architecture import PRESETS
from experiments.models.ssd.network import SSD, L2Norm

TINY = SSD(3, detection_runs.TINY)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("image_size", [None, 320])
def test_there_is_an_output_for_each_default_box(preset, image_size):
    architecture = PRESETS[preset]
    if image_size is not None:
        changes = {"image_size": image_size}
        architecture = type(architecture)(**(vars(architecture) | changes))
    size, num_channels = architecture.image_size, architecture.num_channels
    image = jax.ShapeDtypeStruct((2, size, size, num_channels), jnp.float32)
    model = SSD(20, architecture)
    (offsets, logits), variables = jax.eval_shape(
        model.init_with_output, jax.random.key(0), image
    )
    num_anchors = len(default_boxes(architecture.levels()))
    assert offsets.shape == (2, num_anchors, 4)
    assert logits.shape == (2, num_anchors, 21)
    if preset == "ssd300":
        params = variables["params"]
        assert params["trunk"]["conv4_3"]["kernel"].shape == (3, 3, 512, 512)
        assert params["trunk"]["fc6"]["kernel"].shape == (3, 3, 512, 1024)
        # VGG-16's 14.7 million without its dense layers, and what SSD adds.
        num = sum(x.size for x in jax.tree.leaves(params))
        assert 26.2e6 < num < 26.4e6


def test_outputs_are_those_of_the_places_of_the_default_boxes():
    """A bright spot changes outputs near it, and none far from it, on the first map."""
    params, _ = make_init(TINY)(jax.random.key(0))
    image = np.zeros((2, 16, 16, 1), np.float32)
    image[1, 3, 12] = 1.0  # row 3, column 12
    offsets, _ = jax.jit(TINY.apply)({"params": params}, image)
    is_changed = np.abs(offsets[1] - offsets[0]).sum(-1)[: 8 * 8 * 4] > 0
    anchors = default_boxes(detection_runs.TINY.levels())[: 8 * 8 * 4]
    distance = np.abs(anchors[:, :2] - np.array([12.5, 3.5]) / 16).max(-1)
    assert is_changed.any()
    assert distance[is_changed].max() < 0.45


def test_pools_are_those_of_flax():
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    floor, ceil = max_pool(x), max_pool(x, ceil=True)
    np.testing.assert_array_equal(floor, nn.max_pool(x, (2, 2), (2, 2)))
    np.testing.assert_array_equal(ceil, nn.max_pool(x, (2, 2), (2, 2), "SAME"))
    same = nn.max_pool(x, (3, 3), (1, 1), "SAME")
    np.testing.assert_array_equal(max_filter(x), same)


def test_the_norm_of_a_places_features_is_20():
    x = 1e3 * np.random.default_rng(0).normal(size=(1, 2, 2, 8)).astype(np.float16)
    y, _ = L2Norm().init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.float16
    norms = np.linalg.norm(np.asarray(y, np.float32), axis=-1)
    np.testing.assert_allclose(norms, 20, rtol=1e-3)


def batch(seed=0, num_objects=2):
    rng = np.random.default_rng(seed)
    boxes = np.stack([detection_runs.random_boxes(rng, 2) for _ in range(4)])
    mask = np.arange(2)[None] < np.array([num_objects, num_objects, 1, 0])[:, None]
    return {
        "image": rng.random((4, 16, 16, 1), np.float32),
        "boxes": boxes,
        "labels": rng.integers(1, 4, (4, 2)).astype(np.int32),
        "mask": mask if num_objects else np.zeros_like(mask),
    }


@pytest.mark.parametrize(
    ("policy", "autocast"),
    [
        ("mixed_float16", True),
        pytest.param("mixed_float16", False, marks=pytest.mark.slow),
        pytest.param("mixed_bfloat16", True, marks=pytest.mark.slow),
        pytest.param("mixed_bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_gradients_in_half_are_finite_and_near_those_of_float32(policy, autocast):
    params, _ = make_init(TINY)(jax.random.key(1))
    tx = mpjax.with_loss_scale(optax.sgd(1.0), mpjax.StaticLossScale(128.0))
    grads = {}
    for name in ("float32", policy):
        step = mpjax.make_train_step(
            make_loss_fn(TINY), tx, policy=name, autocast=autocast,
            no_cast_inputs="boxes", donate=False,
        )  # fmt: skip
        state = mpjax.TrainState.create(params=params, tx=tx)
        new, metrics = step(state, batch())
        assert bool(metrics["grads_finite"])
        assert int(metrics["num_matches"]) > 0
        grads[name] = jax.tree.map(lambda a, b: a - b, params, new.params)
    ours, theirs = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)])
        for g in grads.values()
    )
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(ours)
    assert 0 < error < 0.2


def test_a_batch_without_objects_moves_nothing():
    params, _ = make_init(TINY)(jax.random.key(1))
    loss_fn = make_loss_fn(TINY)
    (loss, aux), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        params, batch(num_objects=0), jax.random.key(0)
    )
    assert (float(loss), int(aux["num_matches"])) == (0.0, 0)
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))
