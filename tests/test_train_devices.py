"""The train step on eight devices: shard_map, data parallel, fully sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import (
    assert_same_bits,
    batch_norm_model,
    everything,
    over_devices,
    regression_batch,
    rich_optimizer,
)
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax import sharding

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices; conftest makes them on a CPU"
)


def auto_mesh(shape, names):
    return sharding.auto_mesh(jax.make_mesh(shape, names))


def rich(axis_name=None, **kwargs):
    params, model_state, loss_fn = batch_norm_model()
    scale = mpjax.DynamicLossScale(2.0**6)  # of four examples: no overflow by chance
    tx = mpjax.with_loss_scale(rich_optimizer(), scale, axis_name=axis_name)
    state = mpjax.TrainState.create(
        params=params, tx=tx, model_state=model_state, ema=True
    )
    step = mpjax.make_train_step(
        loss_fn,
        tx,
        ema_decay=0.9,
        num_microbatches=2,
        axis_name=axis_name,
        donate=False,
        **kwargs,
    )
    return state, step


@pytest.mark.parametrize(
    "check_vma", [True, pytest.param(False, marks=pytest.mark.weekly)]
)
def test_shard_map_where_one_shard_overflows(check_vma):
    mesh = auto_mesh((8,), ("data",))
    state, step = rich("data")
    mapped = over_devices(step, mesh, check_vma=check_vma)
    state, metrics = mapped(state, regression_batch(64))
    assert bool(metrics["grads_finite"])
    assert int(metrics["num_examples"]) == 64
    after, metrics = mapped(state, regression_batch(64, seed=1, spike=np.inf))
    assert not bool(metrics["grads_finite"])
    assert_same_bits(everything(after), everything(state))
    for leaf in jax.tree.leaves((after.params, after.opt_state, metrics)):
        shards = [np.asarray(s.data).tobytes() for s in leaf.addressable_shards]
        assert len(shards) == 8
        assert len(set(shards)) == 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_averages_like_one_device(check_vma):
    """Gradient, loss and aux of eight shards equal those of the whole batch."""
    mesh = auto_mesh((8,), ("data",))

    def loss_fn(params, batch, key):
        error = batch["x"] @ params["w"] - batch["label"]
        return jnp.mean(error**2), {"mae": abs(error).mean(), "num": error.size}

    params = {"w": jnp.linspace(-1, 1, 4)}
    results = []
    for axis_name in (None, "data"):
        tx = mpjax.with_loss_scale(optax.sgd(0.1), axis_name=axis_name)
        state = mpjax.TrainState.create(params=params, tx=tx)
        step = mpjax.make_train_step(
            loss_fn, tx, policy="float32", axis_name=axis_name, donate=False
        )
        if axis_name:
            step = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(P(), P("data")),
                out_specs=(P(), P()),
                check_vma=check_vma,
            )
        results.append(jax.jit(step)(state, regression_batch(64)))
    (one, one_metrics), (eight, eight_metrics) = results
    np.testing.assert_allclose(eight.params["w"], one.params["w"], rtol=1e-5)
    for name in one_metrics:
        np.testing.assert_allclose(eight_metrics[name], one_metrics[name], rtol=1e-5)


def test_the_optimizer_alone_agrees_over_shards_it_does_not_average():
    """Each device owns a piece of the gradient; one bad piece skips everywhere."""
    mesh = auto_mesh((8,), ("data",))
    tx = mpjax.with_loss_scale(optax.sgd(1.0), axis_name="data")
    grads = jnp.ones(8).at[3].set(jnp.nan)

    def update(grads):
        state = tx.init(grads)
        updates, state = tx.update(grads, state)
        return updates, state.loss_scale.loss_scale[None], state.num_skipped[None]

    mapped = jax.shard_map(
        update, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    updates, scales, skipped = jax.jit(mapped)(grads)
    assert updates.tolist() == [0.0] * 8
    assert scales.tolist() == [2.0**14] * 8
    assert skipped.tolist() == [1] * 8


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2, 4), ("data", "fsdp")),
        pytest.param((8,), ("data",), marks=pytest.mark.slow),
        pytest.param((8,), ("fsdp",), marks=pytest.mark.slow),
    ],
)
def test_mesh(shape, names, caplog):
    """Data parallel and fully sharded steps train like one device."""
    mesh = jax.make_mesh(shape, names)
    batches = [regression_batch(64, seed=s) for s in range(3)]
    batches.insert(1, regression_batch(64, seed=9, spike=np.inf))
    expected, plain_step = rich()
    for batch in batches:
        expected, expected_metrics = plain_step(expected, batch)
    state, step = rich(mesh=mesh)
    state = sharding.shard_state(state, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    with jax.log_compiles():
        for index, batch in enumerate(batches):
            state, metrics = step(state, sharding.shard_batch(batch, mesh))
            if index == 0:
                assert "Compiling" in caplog.text
                caplog.clear()
    assert "Compiling" not in caplog.text
    after = jax.tree.map(lambda x: x.sharding, state)
    same = jax.tree.map(
        lambda a, b, x: a.is_equivalent_to(b, x.ndim), after, shardings, state
    )
    assert all(jax.tree.leaves(same))
    w0 = state.params["w0"]
    is_split = "fsdp" in names
    assert w0.sharding.is_fully_replicated != is_split
    if is_split:
        assert w0.addressable_shards[0].data.size == w0.size // mesh.shape["fsdp"]
    assert int(metrics["num_skipped"]) == 1
    for got, want in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-3)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=2e-2)
    eval_step = mpjax.make_eval_step(
        lambda params, model_state, batch: batch["x"] @ params["w0"], mesh=mesh
    )
    assert eval_step(state, batches[0]).shape == (64, 8)


def test_a_mesh_without_a_batch_axis_is_refused():
    mesh = jax.make_mesh((8,), ("model",))
    with pytest.raises(ValueError, match="'data'"):
        sharding.batch_sharding(mesh)


def test_small_and_odd_arrays_are_replicated():
    mesh = jax.make_mesh((8,), ("fsdp",))
    tree = {"odd": jnp.ones((3, 5)), "small": jnp.ones(8), "big": jnp.ones((3, 64))}
    specs = jax.tree.map(lambda s: s.spec, sharding.state_sharding(tree, mesh))
    assert specs == {"odd": P(), "small": P(), "big": P(None, "fsdp")}
