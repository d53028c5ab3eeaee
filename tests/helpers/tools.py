"""Shared helpers: bitwise comparison of trees, and a model that overflows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax._tree import is_key


def leaf_bytes(tree):
    """Returns the bytes of every leaf by path, PRNG keys by their data."""

    def data(x):
        return np.asarray(jax.random.key_data(x) if is_key(x) else x)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): (data(x).dtype, data(x).shape, data(x).tobytes())
        for path, x in leaves
    }


def assert_same_bits(a, b):
    a, b = leaf_bytes(a), leaf_bytes(b)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


def everything(state):
    """Returns what a skipped step must not move: all but loss scale, counters, key."""
    opt = jax.tree.map(
        lambda x: x.inner_state if isinstance(x, mpjax.LossScaleState) else x,
        state.opt_state,
        is_leaf=lambda x: isinstance(x, mpjax.LossScaleState),
    )
    return (state.step, state.params, opt, state.model_state, state.ema_params)


def rich_optimizer():
    """Clipping, decay, Adam and a cosine schedule, as people train."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(1e-2, 50), weight_decay=1e-3),
    )


def batch_norm_model():
    """A two-layer network with BatchNorm, by hand: params, model state, loss_fn."""
    keys = jax.random.split(jax.random.key(7), 2)
    params = {
        "w0": jax.random.normal(keys[0], (4, 8)) / 2,
        "scale": jnp.ones(8),
        "w1": jax.random.normal(keys[1], (8, 1)) / 3,
    }
    model_state = {"mean": jnp.zeros(8), "var": jnp.ones(8), "count": jnp.int32(0)}

    def loss_fn(params, model_state, batch, key):
        h = batch["x"] @ params["w0"]
        h32 = h.astype(jnp.float32)
        mean, var = h32.mean(0), h32.var(0)
        new_state = {
            "mean": 0.9 * model_state["mean"] + 0.1 * mean,
            "var": 0.9 * model_state["var"] + 0.1 * var,
            "count": model_state["count"] + 1,
        }
        h = ((h32 - mean) * jax.lax.rsqrt(var + 1e-5)).astype(h.dtype) * params["scale"]
        keep = jax.random.bernoulli(key, 0.9, h.shape)
        out = jnp.where(keep, jax.nn.relu(h), 0) @ params["w1"]
        error = out[:, 0].astype(jnp.float32) - batch["label"]
        return jnp.mean(error**2), (new_state, {"num_examples": len(error)})

    return params, model_state, loss_fn


def regression_batch(size=16, seed=0, spike=None):
    """Inputs (B, 4) and labels (B,); `spike` overwrites one input."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 4)).astype(np.float32)
    label = rng.normal(size=size).astype(np.float32)
    if spike is not None:
        x[0, 0] = spike
    return {"x": jnp.asarray(x), "label": jnp.asarray(label)}


def over_devices(step, mesh, *, check_vma):
    """Maps a train step over the axis `data`: the batch is split, the state is not."""
    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=(P(), P()),
            check_vma=check_vma,
        )
    )


def thinned(values, step=3, rest=None):
    """Returns one value in `step` as it is, without a mark.

    Where `step` is over 2, a quarter as many are slow; the others are weekly. With
    `rest`, all the others have that mark.
    """

    def marks(index):
        if index % step == 0:
            return []
        mark = "slow" if index % (4 * step) == 2 else "weekly"
        return [getattr(pytest.mark, rest or mark)]

    return [
        pytest.param(value, marks=marks(index)) for index, value in enumerate(values)
    ]
