"""Trains in one of two processes of two CPU devices each; prints JSON.

    python tests/helpers/two_processes.py INDEX PORT MESH

tests/sharding/test_processes.py starts both, and trains the same on four devices of its
own process.
"""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers.tools import batch_norm_model, everything, regression_batch, rich_optimizer

import mpjax
from mpjax import sharding
from mpjax._tree import is_key

BATCH_SIZE = 16
SPIKE_AT = 2  # A step whose first example, of one device, is Inf.


def make_mesh(name):
    """Returns a mesh of four devices, the first two being those of process 0."""
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    if name == "tensor over processes":
        return jax.sharding.Mesh(devices.T, ("data", "tensor"))
    return jax.sharding.Mesh(devices, ("data", "fsdp"))


def make_layout(name):
    spec = jax.sharding.PartitionSpec(None, "tensor")
    rules = [("w0", spec)] if name == "tensor over processes" else []
    return sharding.LayoutRules(rules)


def start(mesh, layout):
    """Returns a state, and a step that all processes must compile alike."""
    params, model_state, loss_fn = batch_norm_model()
    tx = mpjax.with_loss_scale(rich_optimizer(), mpjax.DynamicLossScale(2.0**6))
    state = mpjax.TrainState.create(
        params=params, tx=tx, model_state=model_state, ema=True
    )
    step = mpjax.make_train_step(
        loss_fn, tx, ema_decay=0.9, mesh=mesh, layout=layout, donate=False
    )
    return sharding.shard_state(state, mesh, layout=layout), step


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


def main(index, port, name):
    """Trains by examples of its own, then by whole batches, and misuses both."""
    jax.distributed.initialize(
        f"127.0.0.1:{port}", 2, index, initialization_timeout=300
    )
    mesh, layout = make_mesh(name), make_layout(name)
    state, step = start(mesh, layout)
    is_shared = "tensor" in mesh.axis_names
    share = slice(None) if is_shared else slice(8 * index, 8 * index + 8)

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
