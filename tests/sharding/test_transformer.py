"""The transformer of the benchmarks on eight devices, split over all three axes."""

import jax
import numpy as np
import optax
import pytest
from helpers.layouts import transformer_layout

import mpjax
from experiments.benchmarks.workloads import transformer
from mpjax import sharding

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices; conftest makes them on a CPU"
)


def train(policy, mesh=None, layout=None):
    """Returns the losses of three steps, and the state after them."""
    work = transformer(width=128, length=32, num_layers=2)
    tx = mpjax.with_loss_scale(optax.sgd(0.1, momentum=0.9), mpjax.NoOpLossScale())
    params = work.init_params(jax.random.key(0))
    state = mpjax.TrainState.create(params=params, tx=tx)
    if mesh is not None:
        state = sharding.shard_state(state, mesh, layout=layout)
    step = mpjax.make_train_step(
        work.loss_fn, tx, policy=policy, mesh=mesh, layout=layout
    )
    losses = []
    for seed in range(3):
        state, metrics = step(state, work.make_batch(jax.random.key(seed), 8))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize(
    ("policy", "bound"),
    [("float32", 2e-7), pytest.param("mixed_bfloat16", 2e-4, marks=pytest.mark.slow)],
)
def test_columns_and_rows_over_tensor_train_like_one_device(policy, bound):
    """Bounds: of the loss, relative; of a parameter (about 1), absolute."""
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    expected_losses, expected = train(policy)
    losses, state = train(policy, mesh, transformer_layout())
    np.testing.assert_allclose(losses, expected_losses, rtol=bound)
    pairs = map(jax.tree.leaves, (state.params, expected.params))
    for got, want in zip(*pairs, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=bound)
    trace = state.opt_state.inner_state[0].trace
    for tree in (state.params, trace):
        for x in (tree["qkv"], tree["out"], tree["up"]["w"], tree["down"]["w"]):
            assert x.addressable_shards[0].data.size == x.size // 4
