"""No sum runs in half, whatever context XLA compiles a matmul in.

From jax 0.11 on, XLA on a CPU with bfloat16 instructions accumulates in bfloat16 unless
a matmul has a form that it knows; some forms do so on any CPU.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import thinned
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax import autocast
from mpjax.sharding import auto_mesh, shard_state

SIZES = {"m": 32, "n": 48, "k": 512, "b": 4, "t": 128, "q": 128, "h": 4, "d": 32}
FORMS = (
    "km,kn->mn", "btk,btn->kn", "mk,kn->mn", "mk,nk->mn", "km,nk->mn", "mk,kn->nm",
    "mk,nk->nm", "km,kn->nm", "km,nk->nm", "bmk,bkn->bmn", "bkm,bkn->bmn",
    "bmk,bnk->bnm", "bkm,bkn->bnm", "qbm,qbn->bmn", "bhqk,bqhd->bkhd", "btk,kn->btn",
    "kbm,kbn->bmn", "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd",
)  # fmt: skip
USUAL = FORMS[0]


def mesh(num):
    return auto_mesh(jax.make_mesh((num,), ("data",), devices=jax.devices()[:num]))


def in_shard_map(num):
    def wrap(fn):
        specs = {"in_specs": (P(), P()), "out_specs": P(), "check_vma": False}
        return jax.jit(jax.shard_map(fn, mesh=mesh(num), **specs))

    return wrap


def in_scan(fn):
    body = lambda x, y: lambda carry, _: (carry, fn(x + carry, y))
    last = lambda tree: jax.tree.map(lambda a: a[-1], tree)
    return jax.jit(lambda x, y: last(jax.lax.scan(body(x, y), 0.0, None, length=2)[1]))


def in_while(fn):
    def run(x, y):
        body = lambda i, out: fn(x + 0.0 * i, y)
        return jax.lax.fori_loop(0, 2, body, fn(x, y))

    return jax.jit(run)


def in_cond(fn):
    zeros = lambda x, y: jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, x, y)
    )
    return jax.jit(lambda x, y: jax.lax.cond(x.sum() > 0, fn, zeros, x, y))


def in_vmap(fn):
    def run(x, y):
        outputs = jax.vmap(fn)(jnp.stack([x, x]), jnp.stack([y, y]))
        return jax.tree.map(lambda a: a[1], outputs)

    return jax.jit(run)


def under_mesh(num):
    def wrap(fn):
        def run(x, y):
            with jax.set_mesh(mesh(num)):
                return jax.jit(fn)(x, y)

        return run

    return wrap


CONTEXTS = {
    "jit": jax.jit,
    "scan": in_scan,
    "scan in scan": lambda fn: in_scan(in_scan(fn)),
    "fori_loop": in_while,
    "cond": in_cond,
    "vmap": in_vmap,
    "remat": lambda fn: jax.jit(jax.checkpoint(fn)),
    "shard_map, 1": in_shard_map(1),
    "shard_map, 4": in_shard_map(4),
    "scan in shard_map": lambda fn: in_shard_map(4)(in_scan(fn)),
    "shard_map in scan": lambda fn: in_scan(in_shard_map(4)(fn)),
    "set_mesh, 4": under_mesh(4),
}
PARTITIONED = ("shard_map", "set_mesh")


def cases():
    for form in FORMS:
        for context in CONTEXTS:
            marks = () if form == USUAL else pytest.mark.weekly
            yield pytest.param(form, context, marks=marks)


def operands(form):
    shapes = [[SIZES[c] for c in x] for x in form.split("->")[0].split(",")]
    keys = jax.random.split(jax.random.key(0), 2)
    return [
        jax.random.uniform(key, shape, minval=0.5)
        .astype(jnp.bfloat16)
        .astype(jnp.float32)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def value_and_gradients(form):
    """Of the mean, whose cotangent is one number, broadcast."""

    def fn(x, y):
        loss = lambda x, y: jnp.einsum(form, x, y).mean()
        return jnp.einsum(form, x, y), *jax.grad(loss, (0, 1))(x, y)

    return fn


def truth(form, x, y):
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    (left, right), out = form.split("->")[0].split(","), form.split("->")[1]
    value = np.einsum(form, x, y)
    one = float(jnp.asarray(1 / value.size, jnp.bfloat16))
    cotangent = np.full(value.shape, one)
    return (
        value,
        np.einsum(f"{out},{right}->{left}", cotangent, y),
        np.einsum(f"{out},{left}->{right}", cotangent, x),
    )


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize(("form", "context"), list(cases()))
def test_sums_are_float32(form, context):
    args = operands(form)
    fn = CONTEXTS[context](autocast(value_and_gradients(form)))
    for found, right in zip(fn(*args), truth(form, *args), strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - right)
        assert error <= 1.2 * 2.0**-8 * np.linalg.norm(right)


MATMUL = re.compile(
    r"stablehlo\.dot_general .*?contracting_dims = \[(.*?)\] x \[(.*?)\].*"
    r": \(tensor<(\S*?)xbf16>, tensor<(\S*?)xbf16>"
)


@pytest.mark.parametrize("form", thinned(FORMS))
@pytest.mark.parametrize("context", ["jit", "scan", "shard_map, 1", "shard_map, 4"])
def test_no_unsafe_form_is_left(form, context):
    """In one program, XLA knows two contracted axes, or the last of both operands.

    In a partitioned one a CPU gets float32, any other device bfloat16.
    """
    if context == "shard_map, 4" and jax.device_count() < 4:
        pytest.skip("needs four devices")
    args = operands(form)
    fn = CONTEXTS[context](autocast(value_and_gradients(form)))
    text = fn.lower(*args).as_text()
    found = MATMUL.findall(text)
    assert "dot_general" in text
    if context.startswith(PARTITIONED):
        assert not found
        for_gpu = fn.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        dots = [x for x in for_gpu.splitlines() if "stablehlo.dot_general" in x]
        assert len(dots) == 3
        assert all("bf16" in x and "f32" not in x for x in dots)
        return
    assert len(found) == 3
    for *axes, left, right in found:
        last = [str(len(shape.split("x")) - 1) for shape in (left, right)]
        assert axes == last or all("," in each for each in axes)


def step_gradient(num, axis_name, **options):
    """The gradient of a weight, 1 where the sum over 1024 rows is right."""
    tx = mpjax.with_loss_scale(optax.sgd(1.0), mpjax.NoOpLossScale())
    state = mpjax.TrainState.create(params={"w": jnp.zeros((64, 64))}, tx=tx)
    batch = jnp.ones((1024, 64))
    loss_fn = lambda params, batch, key: (batch @ params["w"]).mean()
    step = mpjax.make_train_step(
        loss_fn, tx, axis_name=axis_name, donate=False, **options
    )
    if axis_name:
        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        step = jax.jit(jax.shard_map(step, mesh=mesh(num), **specs))
    elif num:
        state = shard_state(state, mesh(num))
        batch = jax.device_put(batch, NamedSharding(mesh(num), P("data")))
    return -64 * np.asarray(step(state, batch)[0].params["w"])


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("where", ["alone", "mesh", "shard_map"])
@pytest.mark.parametrize("num", [1, 4])
def test_the_gradient_of_a_train_step(where, num, num_microbatches):
    gradient = step_gradient(
        0 if where == "alone" else num,
        "data" if where == "shard_map" else None,
        policy="mixed_bfloat16",
        num_microbatches=num_microbatches,
        mesh=mesh(num) if where == "mesh" else None,
    )
    assert np.all(gradient == 1)
