"""Sharded steps of small models, and the collectives in their compiled text."""

import functools
import re
import uuid
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax
from mpjax import sharding

MESHES = {
    "data": ((8,), ("data",)),
    "fsdp": ((8,), ("fsdp",)),
    "data x fsdp": ((2, 4), ("data", "fsdp")),
}
NHWC = ("NHWC", "HWIO", "NHWC")


class Collective(NamedTuple):
    """An array that a collective returns.

    Attributes:
      op: such as "all-reduce".
      dtype: such as "bf16".
      shape: its shape on one device.
      computation: "ENTRY", or "inner" inside a loop.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    computation: str

    @property
    def size(self):
        """The number of its elements."""
        return int(np.prod(self.shape, dtype=int))


_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(text):
    """Returns each array that a collective returns in compiled HLO."""
    found, computation = [], ""
    for line in text.splitlines():
        if line.endswith("{") and "(" in line:
            computation = "ENTRY" if line.startswith("ENTRY") else "inner"
        match = _COLLECTIVE.search(line)
        if match:
            arrays = _ARRAY.findall(re.sub(r"/\*.*?\*/|\{.*?\}", "", match[1]))
            if match[1].startswith("(("):  # Asynchronous: (operands), results.
                arrays = arrays[len(arrays) // 2 :]
            for dtype, shape in arrays:
                shape = tuple(map(int, filter(None, shape.split(","))))
                found.append(Collective(match[2], dtype, shape, computation))
    return found


def half_reductions(text):
    """Returns the reductions over devices in half precision."""
    return [
        x
        for x in collectives(text)
        if x.op in ("all-reduce", "reduce-scatter") and x.dtype in ("bf16", "f16")
    ]


def dense(keep, params, batch, key):
    x = batch["x"]
    for layer in params:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return jnp.mean(x**2)


def conv(keep, params, batch, key):
    x = batch["x"].reshape(-1, 2, 2, 16)
    for layer in params["layers"]:
        x = jax.lax.conv_general_dilated(
            x, layer["w"], (1, 1), "SAME", None, None, NHWC
        )
        x = jax.nn.relu(x + layer["b"])
    return jnp.mean((x.mean((1, 2)) @ params["head"]) ** 2)


def embedding(keep, params, batch, key):
    ids = (jnp.abs(batch["x"][:, :4]) * 10).astype(jnp.int32) % 16
    x = keep(params["table"][ids] + params["position"])
    return jnp.mean(keep(x @ params["table"].T) ** 2)


def scan(keep, params, batch, key, remat=False):
    def layer(x, p):
        h = (x - x.mean(-1, keepdims=True)) * p["scale"]
        return keep(x + keep(jax.nn.gelu(h @ p["up"] + p["b"])) @ p["down"]), None

    layer = jax.checkpoint(layer) if remat else layer
    return jnp.mean(jax.lax.scan(layer, batch["x"], params)[0] ** 2)


def rnn(keep, params, batch, key):
    def step(h, x):
        return jnp.tanh(h @ params["h"] + x @ params["x"] + params["b"]), None

    xs = batch["x"].reshape(-1, 4, 16).swapaxes(0, 1)
    return jnp.mean(jax.lax.scan(step, jnp.zeros((xs.shape[1], 32)), xs)[0] ** 2)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[-2] ** 0.5


def layers(*shapes):
    return [{"w": normal(i, *s), "b": jnp.zeros(s[-1])} for i, s in enumerate(shapes)]


MODELS = {
    "dense": (dense, layers(*[(64, 64)] * 3)),
    "conv": (
        conv,
        {"layers": layers(*[(3, 3, 16, 16)] * 2), "head": normal(2, 16, 16)},
    ),
    "embedding": (
        embedding,
        {"table": normal(0, 16, 32), "position": normal(1, 4, 32)},
    ),
    "scan": (
        scan,
        {
            "scale": jnp.ones((3, 64)),
            "up": normal(0, 3, 64, 128),
            "b": jnp.zeros((3, 128)),
            "down": normal(1, 3, 128, 64),
        },
    ),
    "rnn": (
        rnn,
        {"h": normal(0, 32, 32), "x": normal(1, 16, 32), "b": jnp.zeros(32)},
    ),
}
MODELS["scan, remat"] = (functools.partial(scan, remat=True), MODELS["scan"][1])


def sharded_step(name, mesh, **kwargs):
    """Returns a train step, and shapes of its state and batch, split over a mesh."""
    model, params = MODELS[name]
    tx = mpjax.with_loss_scale(optax.sgd(0.1))

    def keep(x):
        """Keeps activations split over the batch, and over no other axis."""
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, sharding.batch_sharding(mesh))

    step = mpjax.make_train_step(
        functools.partial(model, keep), tx, mesh=mesh, **kwargs
    )
    state = jax.eval_shape(lambda: mpjax.TrainState.create(params=params, tx=tx))
    batch = {"x": jax.ShapeDtypeStruct((64, 64), jnp.float32)}

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    if mesh is not None:
        state = jax.tree.map(place, state, sharding.state_sharding(state, mesh))
        batch = {"x": place(batch["x"], sharding.batch_sharding(mesh))}
    return step, state, batch


def partitioned_text(step, *args, folder):
    """Compiles a step; returns its HLO right after it is partitioned over devices.

    Later XLA:CPU reduces in float32 whatever the dtype was.
    """
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}

    def fn(*args):
        return step(*args)

    # A new name, since what comes from JAX's cache of compiled programs is not dumped.
    fn.__name__ = f"step_{uuid.uuid4().hex}"
    jax.jit(fn).lower(*args).compile(compiler_options=options)
    (path,) = folder.glob("*after_spmd-partitioning*")
    return path.read_text()
