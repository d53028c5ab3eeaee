"""Trains in one of two processes of two CPU devices each; prints JSON.

    python tests/helpers/two_processes.py INDEX PORT CASE

tests/sharding/test_processes.py starts both, and trains the same on four devices of its
own process.
"""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers.tools import batch_norm_model, everything, regression_batch, rich_optimizer

import mpjax
from mpjax import sharding
from mpjax._tree import is_key

BATCH_SIZE = 16
SPIKE_AT = 2  # A step whose first example, of one device, is Inf.


def start(case):
    """Returns mesh, layout, state and step of a case, alike in every process.

    Args:
      case: "plain", two matrices; "rich", with BatchNorm, dropout and an EMA; "tensor",
        rich, with an axis `tensor` that spans the processes.
    """
    # Of the four devices, two belong to process 0.
    devices, layout = np.array(jax.devices()[:4]).reshape(2, 2), None
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp"))
    if case == "tensor":
        mesh = jax.sharding.Mesh(devices.T, ("data", "tensor"))
        layout = sharding.LayoutRules([("w0", PartitionSpec(None, "tensor"))])
    params, model_state, loss_fn = batch_norm_model()
    inner, ema_decay = rich_optimizer(), 0.9
    if case == "plain":
        params = {name: params[name] for name in ("w0", "w1")}
        model_state, loss_fn = None, plain_loss
        inner, ema_decay = optax.adam(1e-2), None
    tx = mpjax.with_loss_scale(inner, mpjax.DynamicLossScale(2.0**6))
    state = mpjax.TrainState.create(
        params=params, tx=tx, model_state=model_state, ema=ema_decay is not None
    )
    step = mpjax.make_train_step(
        loss_fn, tx, ema_decay=ema_decay, mesh=mesh, layout=layout, donate=False
    )
    return mesh, layout, sharding.shard_state(state, mesh, layout=layout), step


def plain_loss(params, batch, key):
    predicted = jax.nn.relu(batch["x"] @ params["w0"]) @ params["w1"]
    return jnp.mean((predicted[:, 0] - batch["label"]) ** 2)


def train(state, step, place):
    """Takes four steps; returns the state, metrics, and whether the skip moved any."""
    rows, moved = [], None
    for seed in range(4):
        spike = np.inf if seed == SPIKE_AT else None
        batch = place(regression_batch(BATCH_SIZE, seed=seed, spike=spike))
        before = state
        state, metrics = step(state, batch)
        rows.append([float(metrics[name]) for name in ("loss_scale", "grads_finite")])
        if seed == SPIKE_AT:
            moved = local_bytes(everything(state)) != local_bytes(everything(before))
    return state, rows, moved


def local_bytes(tree):
    """Returns the bytes of what this process has of a tree."""
    data = lambda x: jax.random.key_data(x) if is_key(x) else x
    return [
        np.asarray(shard.data).tobytes()
        for x in jax.tree.leaves(tree)
        for shard in data(x).addressable_shards
    ]


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


def main(index, port, case):
    """Trains by examples of its own, then by whole batches, and misuses both."""
    jax.distributed.initialize(
        f"127.0.0.1:{port}", 2, index, initialization_timeout=300
    )
    mesh, layout, state, step = start(case)
    share = slice(None) if case == "tensor" else slice(8 * index, 8 * index + 8)

    def place_own(batch):
        own = jax.tree.map(lambda x: np.asarray(x)[share], batch)
        return sharding.global_batch(own, mesh, batch_size=BATCH_SIZE)

    own, rows, moved = train(state, step, place_own)
    whole, *_ = train(state, step, lambda batch: sharding.shard_batch(batch, mesh))
    params = multihost_utils.process_allgather(own.params, tiled=True)
    again = sharding.shard_state(own, mesh, layout=layout)
    result = {
        "rows": rows,
        "moved": moved,
        "params": {name: x.tolist() for name, x in params.items()},
        "same": local_bytes(own) == local_bytes(whole) == local_bytes(again),
        "unequal": error_of(
            sharding.shard_state, {"a": np.ones(4), "w": np.full(4, index)}, mesh
        ),
        "odd": error_of(sharding.global_batch, {"x": np.ones((3, 4))}, mesh),
        "short": error_of(
            sharding.global_batch, {"x": np.ones((2, 4))}, mesh, batch_size=16
        ),
        "half a mesh": error_of(sharding.make_mesh, "data=2"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
