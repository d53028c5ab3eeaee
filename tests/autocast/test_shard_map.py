"""Inside shard_map: values vary over axes, and that type is kept by every rewrite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tools import thinned
from jax.sharding import PartitionSpec as P

from mpjax import autocast, full_precision
from mpjax._autocast.hoist import hoist_casts_out_of_scans
from mpjax._jaxpr.core import walk
from mpjax.numerics import probe, tap
from mpjax.sharding import auto_mesh

W = jax.random.normal(jax.random.key(0), (4, 4)) / 2
X = jax.random.normal(jax.random.key(1), (16, 4))


@jax.custom_vjp
def doubled(x):
    return jnp.tanh(x) * 2


doubled.defvjp(lambda x: (doubled(x), x), lambda x, g: (g * 2 / jnp.cosh(x) ** 2,))


def scanned(x, w):
    body = lambda h, _: (jax.nn.gelu(h @ w), h.sum())
    return jax.lax.scan(body, x, None, length=3)[0]


def looped(x, w):
    body = lambda i, h: jnp.tanh(h @ w)
    return jax.lax.fori_loop(0, 3, body, x)


BODIES = {
    "relu": lambda x, w: jax.nn.relu(x @ w + w[0]) @ w,
    "gelu": lambda x, w: jax.nn.gelu(x @ w) @ w,
    "silu": lambda x, w: jax.nn.silu(x @ w) @ w,
    "softmax": lambda x, w: jax.nn.softmax(x @ w) @ w,
    "logsumexp": lambda x, w: jax.nn.logsumexp(x @ w, axis=1, keepdims=True) * x,
    "custom_vjp": lambda x, w: doubled(x @ w) @ w,
    "remat": lambda x, w: jax.checkpoint(lambda x: jax.nn.relu(x @ w) @ w)(x),
    "scan": scanned,
    "fori_loop": looped,
    "cond": lambda x, w: jax.lax.cond(
        w[0, 0] > 0, lambda x: jax.nn.relu(x @ w), lambda x: jnp.tanh(x @ w), x
    ),
    "full_precision": lambda x, w: full_precision(jax.nn.relu)(x @ w) @ w,
    "vmap": lambda x, w: jax.vmap(lambda row: jax.nn.relu(row @ w))(x) @ w,
    "all_gather": lambda x, w: jax.lax.all_gather(jax.nn.relu(x @ w), "data")[0] @ w,
    "psum inside": lambda x, w: jax.nn.relu(jax.lax.psum(x @ w, "data")) @ w,
}


def loss_fn(name, num, check_vma):
    mesh = auto_mesh(jax.make_mesh((num,), ("data",), devices=jax.devices()[:num]))

    def local(w, x):
        return jax.lax.pmean((BODIES[name](x, w) ** 2).mean(), "data")

    return jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    )


WAYS = {
    "autocast(grad)": lambda f: autocast(jax.grad(f)),
    "grad(autocast)": lambda f: jax.grad(autocast(f)),
    "grad(autocast), float16": lambda f: jax.grad(autocast(f, "mixed_float16")),
    "jit(grad(autocast))": lambda f: jax.jit(jax.grad(autocast(f))),
    "jvp": lambda f: lambda w, x: jax.jacfwd(autocast(f))(w, x),
    "tap": lambda f: jax.grad(tap(f)),
    "probe": lambda f: lambda *args: probe(jax.grad(tap(f)))(*args)[0],
}


USUAL = ("relu", "custom_vjp", "remat", "scan", "full_precision")


def cases():
    """Some bodies one way round, one body three ways; the others weekly."""
    for name in BODIES:
        for way in WAYS:
            if (name, way) == ("custom_vjp", "jvp"):
                continue  # JAX itself has no forward mode there.
            is_default = (way == "grad(autocast)" and name in USUAL) or (
                way in ("tap", "jit(grad(autocast))") and name == "relu"
            )
            marks = () if is_default else pytest.mark.weekly
            yield pytest.param(name, way, marks=marks)


@pytest.mark.parametrize(("name", "way"), list(cases()))
def test_the_gradient_is_that_of_the_plain_function(name, way):
    num = min(4, jax.device_count())
    fn = loss_fn(name, num, check_vma=True)
    right = jax.jit(jax.grad(fn))(W, X)
    found = WAYS[way](fn)(W, X)
    assert found.dtype == jnp.float32
    tolerance = 1e-5 if way in ("tap", "probe") else 0.03
    error = np.linalg.norm(found - right) / np.linalg.norm(right)
    assert error <= tolerance


@pytest.mark.parametrize("num", [1, pytest.param(4, marks=pytest.mark.weekly)])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("way", thinned(["grad(autocast)", "tap"]))
def test_without_checks_and_on_one_device(way, check_vma, num):
    fn = loss_fn("relu", num, check_vma)
    right = jax.grad(fn)(W, X)
    np.testing.assert_allclose(WAYS[way](fn)(W, X), right, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("way", ["grad(autocast)", "autocast(grad)"])
@pytest.mark.parametrize("name", thinned(["relu", "gelu", "custom_vjp", "scan"]))
def test_matmuls_inside_are_half_whichever_way_round(name, way):
    """On a GPU; a CPU multiplies the same half numbers in float32."""
    traced = jax.jit(WAYS[way](loss_fn(name, 1, True))).trace(W, X)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) >= 3
    assert all("bf16" in line and "f32" not in line for line in dots)


def test_casts_of_weights_are_hoisted_out_of_scans():
    def local(w, x):
        body = lambda h, _: ((h @ w.astype(jnp.bfloat16)).astype(jnp.bfloat16), None)
        h, _ = jax.lax.scan(body, x.astype(jnp.bfloat16), None, length=3)
        return jax.lax.pmean((h.astype(jnp.float32) ** 2).mean(), "data")

    mesh = auto_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    hoisted = hoist_casts_out_of_scans(jax.make_jaxpr(mapped)(W, X))
    scans = [e for e, _, _ in walk(hoisted) if e.primitive.name == "scan"]
    (body,) = (e.params["jaxpr"] for e in scans)
    assert "convert_element_type" not in {e.primitive.name for e in body.eqns}
