"""Over any mesh, overflow, weights and norms are those of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import assert_same_bits, everything
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax import sharding

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices; conftest makes them on a CPU"
)
LAYOUT = sharding.LayoutRules([("w", P("fsdp", "tensor"))])
MAX_NORM = 0.5


def batch(spike=None):
    """Eight examples; the mask counts 0, 1, ... 7 of their 8 outputs."""
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(8, 16)), rng.normal(size=(8, 8))
    mask = np.arange(8) < np.arange(8)[:, None]
    if spike is not None:
        x[-1, 0] = spike
    return {"x": np.float32(x), "label": np.float32(label), "mask": mask}


def loss_fn(params, batch, key):
    errors = jnp.square(batch["x"] @ params["w"] - batch["label"])
    num = jnp.maximum(batch["mask"].sum(), 1)
    return jnp.sum(jnp.where(batch["mask"], errors, 0)) / num


@pytest.mark.parametrize(
    "spec",
    [
        "data=2,fsdp=2,tensor=2",
        pytest.param("data=8", marks=pytest.mark.slow),
        pytest.param("fsdp=8", marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=4", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("num", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_is_that_of_the_whole_batch(spec, num):
    mesh = sharding.make_mesh(spec)
    layout = LAYOUT if "tensor" in spec else None
    clip = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.sgd(1.0))
    tx = mpjax.with_loss_scale(clip, mpjax.DynamicLossScale(2.0**6))
    w = np.linspace(-1, 1, 128, dtype=np.float32).reshape(16, 8)
    state = mpjax.TrainState.create(params={"w": jnp.asarray(w)}, tx=tx)
    state = sharding.shard_state(state, mesh, layout=layout)
    step = mpjax.make_train_step(
        loss_fn,
        tx,
        policy="float32",
        loss_weight=lambda batch: batch["mask"].sum(),
        num_microbatches=num,
        mesh=mesh,
        layout=layout,
        donate=False,
    )
    after, metrics = step(state, sharding.shard_batch(batch(), mesh))

    x, label, mask = (np.float64(batch()[name]) for name in ("x", "label", "mask"))
    error = mask * (x @ w - label)
    grad = 2 * x.T @ error / mask.sum()
    norm = np.linalg.norm(grad)
    assert norm > 2 * MAX_NORM
    assert float(metrics["loss_weight"]) == mask.sum() == 28
    np.testing.assert_allclose(metrics["loss"], (error**2).sum() / 28, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    clipped = w - grad * MAX_NORM / norm
    np.testing.assert_allclose(after.params["w"], clipped, atol=1e-6)

    bad = sharding.shard_batch(batch(spike=np.inf), mesh)
    skipped, metrics = step(after, bad)
    assert not bool(metrics["grads_finite"])
    assert_same_bits(everything(skipped), everything(after))
    scale = mpjax.loss_scale_state(skipped.opt_state).loss_scale.loss_scale
    assert {float(s.data) for s in scale.addressable_shards} == {2.0**5}
