"""Losses that are means over what is not padding, over microbatches and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import assert_same_bits, everything, over_devices, thinned
from hypothesis import given, settings
from hypothesis import strategies as st

import mpjax
from mpjax import sharding

NUM, LENGTH = 8, 4
TX = mpjax.with_loss_scale(optax.sgd(1.0), mpjax.DynamicLossScale(2.0**4))


def loss_fn(params, batch, key):
    """A mean over what is not padding; NaN where all of a piece is."""
    error = (batch["x"] * params["w"] - 1) ** 2
    num = batch["mask"].sum()
    loss = (error * batch["mask"]).sum() / num
    return loss, {"mean_x": (batch["x"] * batch["mask"]).sum() / num, "num": num}


def count(batch):
    return batch["mask"].sum()


def truth(x, mask, w=0.5):
    """Loss, derivative and mean of x in float64."""
    x, mask = np.asarray(x, np.float64), np.asarray(mask, np.float64)
    error = x * w - 1
    num = mask.sum()
    return {
        "loss": (error**2 * mask).sum() / num,
        "gradient": (2 * error * x * mask).sum() / num,
        "mean_x": (x * mask).sum() / num,
        "num": num,
    }


def inputs(lengths, seed=0):
    x = jax.random.uniform(jax.random.key(seed), (NUM, LENGTH), minval=0.5, maxval=2)
    mask = np.arange(LENGTH) < np.asarray(lengths)[:, None]
    return {"x": x, "mask": jnp.asarray(mask, jnp.int32)}


@functools.cache
def make_step(num_microbatches, policy="float32", weight=count, **options):
    return mpjax.make_train_step(
        loss_fn,
        TX,
        policy=policy,
        num_microbatches=num_microbatches,
        loss_weight=weight,
        donate=False,
        **options,
    )


def start():
    return mpjax.TrainState.create(params={"w": jnp.float32(0.5)}, tx=TX)


def assert_true(state, metrics, batch):
    right = truth(batch["x"], batch["mask"])
    found = {
        "loss": metrics["loss"],
        "gradient": 0.5 - state.params["w"],
        "mean_x": metrics["mean_x"],
        "num": metrics["num"],
    }
    for name, value in right.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    assert float(metrics["loss_weight"]) == right["num"]
    np.testing.assert_allclose(
        metrics["grad_norm"], abs(right["gradient"]), rtol=1e-5, atol=1e-6
    )


def assert_nothing_moved(before, after, metrics):
    assert_same_bits(everything(after), everything(before))
    old, new = before.opt_state, after.opt_state
    assert float(new.loss_scale.loss_scale) == float(old.loss_scale.loss_scale)
    assert_same_bits(new.loss_scale, old.loss_scale)
    assert int(new.num_skipped) == int(old.num_skipped) + 1
    assert int(new.num_consecutive_skipped) == int(old.num_consecutive_skipped)
    assert bool(metrics["grads_finite"])
    assert float(metrics["loss"]) == float(metrics["loss_weight"]) == 0
    assert float(metrics["grad_norm"]) == 0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, LENGTH), min_size=NUM, max_size=NUM),
    st.sampled_from([1, 2, 4, 8]),
)
def test_any_padding_gives_the_loss_and_gradient_of_the_whole_batch(lengths, num):
    state, batch = start(), inputs(lengths)
    after, metrics = make_step(num)(state, batch)
    if sum(lengths) == 0:
        assert_nothing_moved(state, after, metrics)
    else:
        assert bool(metrics["grads_finite"])
        assert int(after.step) == 1
        assert_true(after, metrics, batch)


@pytest.mark.parametrize(
    "policy", thinned(["float32", "mixed_float16", "mixed_bfloat16"])
)
@pytest.mark.parametrize("autocast", [True, False])
def test_every_policy(policy, autocast):
    batch = inputs([4, 0, 1, 0, 4, 0, 2, 0])
    step = make_step(2, policy, autocast=autocast, no_cast_inputs=".")
    state, metrics = step(start(), batch)
    right = truth(batch["x"], batch["mask"])
    rtol = 1e-5 if policy == "float32" or autocast else 2e-2
    np.testing.assert_allclose(metrics["loss"], right["loss"], rtol=rtol)
    np.testing.assert_allclose(0.5 - state.params["w"], right["gradient"], rtol=rtol)


@pytest.mark.parametrize("num", thinned([1, 2, 4]))
def test_equal_weights_give_the_bits_of_no_weights(num):
    batch = inputs([LENGTH] * NUM)
    plain = make_step(num, "mixed_bfloat16", None)(start(), batch)
    weighed = make_step(num, "mixed_bfloat16")(start(), batch)
    assert_same_bits(weighed[0], plain[0])
    del weighed[1]["loss_weight"]
    assert_same_bits(weighed[1], plain[1])


def with_running_mean(params, model_state, batch, key):
    loss, aux = loss_fn(params, batch, key)
    mean = 0.5 * model_state["mean"] + 0.5 * aux["mean_x"]
    return loss, ({"mean": mean, "num_updates": model_state["num_updates"] + 1}, aux)


def start_with_running_mean():
    model_state = {"mean": jnp.float32(1.0), "num_updates": jnp.int32(0)}
    return mpjax.TrainState.create(
        params={"w": jnp.float32(0.5)}, tx=TX, model_state=model_state
    )


@pytest.mark.parametrize("num", [2, 8])
def test_a_piece_of_padding_leaves_the_model_state(num):
    """Piece i takes the examples i, i + num, ..., so every second piece is empty."""
    batch = inputs([3, 0] * 4)
    step = mpjax.make_train_step(
        with_running_mean,
        TX,
        policy="float32",
        num_microbatches=num,
        loss_weight=count,
        donate=False,
    )
    state, metrics = step(start_with_running_mean(), batch)
    assert bool(metrics["grads_finite"])
    x, mask = np.asarray(batch["x"]), np.asarray(batch["mask"])
    mean, num_updates = 1.0, 0
    for i in range(0, num, 2):
        mean = 0.5 * mean + 0.5 * (x * mask)[i::num].sum() / mask[i::num].sum()
        num_updates += 1
    np.testing.assert_allclose(state.model_state["mean"], mean, rtol=1e-6)
    assert int(state.model_state["num_updates"]) == num_updates


@pytest.mark.parametrize("num", thinned([1, 2]))
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_skips_the_step(num, weight):
    state = start()
    step = make_step(num, weight=lambda batch: weight * (batch["x"].sum() > 0))
    after, metrics = step(state, inputs([LENGTH] * NUM))
    assert not bool(metrics["grads_finite"])
    assert_same_bits(everything(after), everything(state))
    assert float(after.opt_state.loss_scale.loss_scale) == 2.0**3


def test_numbers_and_booleans_are_weights():
    batch = inputs([LENGTH] * NUM)
    for weight in (lambda b: len(b["x"]), lambda b: b["mask"].any(), lambda b: 2.5):
        _, metrics = make_step(2, weight=weight)(start(), batch)
        np.testing.assert_allclose(
            metrics["loss"], truth(batch["x"], batch["mask"])["loss"], rtol=1e-5
        )


def test_wrong_weights_are_refused():
    with pytest.raises(TypeError, match="loss_weight must be a function of a batch"):
        mpjax.make_train_step(loss_fn, TX, loss_weight=3.0)
    step = make_step(2, weight=lambda batch: batch["mask"].sum(1))
    with pytest.raises(ValueError, match=r"must return one number.*got shape \(4,\)"):
        step(start(), inputs([LENGTH] * NUM))


needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@needs_eight
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("num", [1, 2])
def test_devices_of_shard_map_are_weighed(num, check_vma):
    """On each of four devices two examples; the second device has only padding."""
    mesh = sharding.auto_mesh(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]))
    tx = mpjax.with_loss_scale(optax.sgd(1.0), axis_name="data")
    step = mpjax.make_train_step(
        with_running_mean,
        tx,
        policy="float32",
        num_microbatches=num,
        loss_weight=count,
        axis_name="data",
        donate=False,
    )
    mapped = over_devices(step, mesh, check_vma=check_vma)
    batch = inputs([4, 1, 0, 0, 2, 0, 3, 4])
    state, metrics = mapped(start_with_running_mean(), batch)
    assert_true(state, metrics, batch)
    x, mask = np.asarray(batch["x"], np.float64), np.asarray(batch["mask"])
    if num == 1:
        means, weights = [], []
        for i in range(0, NUM, 2):
            weights.append(mask[i : i + 2].sum())
            mean = (x * mask)[i : i + 2].sum() / max(weights[-1], 1)
            means.append(0.5 + 0.5 * mean)
        right = np.average(means, weights=weights)
        np.testing.assert_allclose(state.model_state["mean"], right, rtol=1e-5)
    assert int(state.model_state["num_updates"]) == num
    for leaf in jax.tree.leaves((state, metrics)):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert (
                len({np.asarray(s.data).tobytes() for s in leaf.addressable_shards})
                == 1
            )

    state = start_with_running_mean()
    after, metrics = mapped(state, inputs([0] * NUM))
    assert_nothing_moved(state, after, metrics)


@needs_eight
@pytest.mark.parametrize("num", [1, 2])
def test_devices_of_a_mesh_are_weighed(num):
    mesh = jax.make_mesh((8,), ("data",))
    batch = inputs([4, 1, 0, 0, 2, 0, 3, 4])
    state = sharding.shard_state(start(), mesh)
    step = make_step(num, mesh=mesh)
    state, metrics = step(state, sharding.shard_batch(batch, mesh))
    assert_true(state, metrics, batch)
