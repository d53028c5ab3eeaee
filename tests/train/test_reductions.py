"""Gradients are added up over devices in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.collectives import (
    MESHES,
    MODELS,
    collectives,
    half_reductions,
    partitioned_text,
    sharded_step,
)
from helpers.tools import over_devices

import mpjax
from mpjax._jaxpr.core import check_jaxpr, dtype_of, eval_jaxpr, open_jaxpr, walk
from mpjax._train.reductions import widen_gradients
from mpjax.sharding import auto_mesh, shard_batch, shard_state

NUM_DEVICES = 8
HALF = {"mixed_float16": "f16", "mixed_bfloat16": "bf16"}

pytestmark = pytest.mark.skipif(
    jax.device_count() < NUM_DEVICES,
    reason="needs eight devices; conftest makes them on a CPU",
)


def text_of(folder, name, mesh, policy="mixed_float16", **kwargs):
    mesh = jax.make_mesh(*MESHES[mesh])
    step, state, batch = sharded_step(name, mesh, policy=policy, **kwargs)
    return partitioned_text(step, state, batch, folder=folder)


def cases():
    """Each model and each mesh once; the other combinations are slow."""
    usual = [
        ("dense", "data x fsdp", "mixed_float16", {"num_microbatches": 2}),
        ("conv", "data x fsdp", "mixed_bfloat16", {}),
        ("embedding", "data", "mixed_bfloat16", {"autocast": False}),
        ("scan, remat", "fsdp", "mixed_float16", {}),
        ("rnn", "data", "mixed_float16", {"autocast": False}),
    ]
    for case in usual:
        yield pytest.param(*case)
    for name in MODELS:
        for mesh in MESHES:
            for policy in HALF:
                for kwargs in ({}, {"autocast": False}, {"num_microbatches": 2}):
                    if (name, mesh, policy, kwargs) not in usual:
                        marks = pytest.mark.slow
                        yield pytest.param(name, mesh, policy, kwargs, marks=marks)


@pytest.mark.parametrize(("name", "mesh", "policy", "kwargs"), list(cases()))
def test_no_reduction_over_devices_is_half(name, mesh, policy, kwargs, tmp_path):
    text = text_of(tmp_path, name, mesh, policy, **kwargs)
    reduced = [x for x in collectives(text) if x.op in ("all-reduce", "reduce-scatter")]
    assert sum(x.size > 1 for x in reduced) >= 1
    assert half_reductions(text) == []


@pytest.mark.parametrize("autocast", [True, False])
def test_weights_are_gathered_in_half(autocast, tmp_path):
    text = text_of(tmp_path, "dense", "fsdp", autocast=autocast)
    weights = [x for x in collectives(text) if x.shape == (64, 64)]
    assert {x.dtype for x in weights if x.op == "all-gather"} == {"f16"}


def test_the_option_compute_reduces_matmuls_in_half(tmp_path):
    text = text_of(tmp_path, "dense", "data", reduce_dtype="compute")
    assert [x.shape for x in half_reductions(text)] == [(64, 64)] * 3


def test_another_dtype_is_refused():
    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"'float32'.*'compute'"):
        mpjax.make_train_step(lambda p, b, k: 0.0, tx, reduce_dtype="bfloat16")


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("num_devices", [0, 1])
def test_nothing_changes_without_several_devices(num_devices, autocast):
    devices = jax.devices()[:num_devices]
    mesh = jax.make_mesh((1,), ("data",), devices=devices) if devices else None
    jaxprs = []
    for kwargs in ({}, {"reduce_dtype": "compute"}):
        step, *args = sharded_step("scan, remat", mesh, autocast=autocast, **kwargs)
        jaxprs.append(str(step.trace(*args).jaxpr))
    assert jaxprs[0] == jaxprs[1]


# Parts of a gradient that nearly cancel.


def nearly_cancelling(dtype):
    """Inputs and cotangents, exact in a half dtype, and their float64 gradient.

    The parts of devices are up to 2000 times as large as their sum.
    """
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(NUM_DEVICES // 2, 16, 32))
    x = np.concatenate([parts, parts + 2**-6 * rng.normal(size=parts.shape)])
    x = np.asarray(jnp.asarray(x, dtype), np.float64).reshape(-1, 32)
    y = rng.normal(size=(NUM_DEVICES // 2, 16, 32))
    y = np.asarray(jnp.asarray(y, dtype), np.float64)
    y = np.concatenate([y, -y]).reshape(-1, 32)
    return x, y, x.T @ y / y.size


def gradient(x, y, policy, how, **kwargs):
    """Returns the gradient of `mean(y * (x @ w))` for w, by one step of SGD."""

    def loss_fn(params, batch, key):
        out = batch["x"] @ params["w"]
        return jnp.mean((out * batch["y"].astype(out.dtype)).astype(jnp.float32))

    # Rescaled, so that float16 does not underflow.
    scale = mpjax.StaticLossScale(float(y.size))
    axis_name = "data" if how == "shard_map" else None
    tx = mpjax.with_loss_scale(optax.sgd(1.0), scale, axis_name=axis_name)
    state = mpjax.TrainState.create(params={"w": jnp.zeros((32, 32))}, tx=tx)
    batch = {"x": jnp.float32(x), "y": jnp.float32(y)}
    mesh = auto_mesh(jax.make_mesh((NUM_DEVICES,), ("data",)))
    if how == "mesh":
        state, batch = shard_state(state, mesh), shard_batch(batch, mesh)
        kwargs |= {"mesh": mesh}
    step = mpjax.make_train_step(
        loss_fn, tx, policy=policy, axis_name=axis_name, donate=False, **kwargs
    )
    if how == "shard_map":
        step = over_devices(step, mesh, check_vma=True)
    state, metrics = step(state, batch)
    assert bool(metrics["grads_finite"])
    return -np.asarray(state.params["w"], np.float64)


def relative_error(found, right):
    found, right = np.asarray(found, np.float64), np.asarray(right)
    return np.linalg.norm(found - right) / np.linalg.norm(right)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("policy", HALF)
def test_parts_that_nearly_cancel_are_as_exact_as_on_one_device(policy, autocast):
    dtype = mpjax.get_policy(policy).compute_dtype
    x, y, right = nearly_cancelling(dtype)
    errors = {
        (how, reduce_dtype): relative_error(
            gradient(x, y, policy, how, autocast=autocast, reduce_dtype=reduce_dtype),
            right,
        )
        for how in ("one device", "mesh", "shard_map")
        for reduce_dtype in ("float32", "compute")
    }
    for how in ("mesh", "shard_map"):
        assert errors[how, "float32"] <= 1.1 * errors["one device", "float32"]
        assert errors["shard_map", "compute"] > 5 * errors[how, "float32"]


# The pass alone, on programs whose parameter `w` is cast to half.


def loop(w, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=3)[0]


def layer_by_layer(w, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]


PROGRAMS = {
    "matmul": (lambda w, x: x @ w, (8, 8)),
    "transposed": (lambda w, x: jnp.einsum("bi,oi->bo", x, w), (4, 8)),
    "bias": (lambda w, x: x + w, (8,)),
    "two uses": (lambda w, x: x @ w @ w, (8, 8)),
    "joined": (lambda w, x: x @ jnp.concatenate([w, w.T], 1), (8, 8)),
    "embedding": (lambda w, x: w[jnp.arange(24) % 4] * x, (4, 8)),
    "jit": (lambda w, x: jax.jit(jnp.matmul)(x, w), (8, 8)),
    "remat": (jax.checkpoint(lambda w, x: jnp.tanh(x @ w)), (8, 8)),
    "loop": (loop, (8, 8)),
    "layers": (layer_by_layer, (2, 8, 8)),
    "cond": (
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (2 * x) @ w),
        (8, 8),
    ),
}
SUMS = ("dot_general", "reduce_sum", "scatter-add", "add_any")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_gradient_written_in_half_is_float32_from_its_sum_on(name):
    fn, shape = PROGRAMS[name]
    w = jax.random.normal(jax.random.key(0), shape) / 2
    x = jax.random.normal(jax.random.key(1), (24, 8)).astype(jnp.bfloat16)

    def gradient(w, x):
        loss = lambda w: jnp.mean(fn(w.astype(x.dtype), x).astype(w.dtype) ** 2)
        return jax.grad(loss)(w)

    closed = jax.make_jaxpr(gradient)(w, x)
    wide = widen_gradients(closed, 1, None)
    check_jaxpr(open_jaxpr(wide))
    (out,), (wide_out,) = open_jaxpr(closed).outvars, open_jaxpr(wide).outvars
    assert wide_out.aval == out.aval

    def half_sums(jaxpr):
        """Returns what adds up, in half, to an array of the parameter's shape."""
        return [
            eqn.primitive.name
            for eqn, _, _ in walk(jaxpr)
            for v in eqn.outvars
            if eqn.primitive.name in SUMS
            and dtype_of(v) == jnp.bfloat16
            and v.aval.shape in (shape, shape[-2:], shape[::-1])
        ]

    assert half_sums(closed)
    assert not half_sums(wide)

    with jax.enable_x64(True):
        right = gradient(np.asarray(w, np.float64), np.asarray(x, np.float64))

    def error(jaxpr):
        (found,) = jax.jit(
            lambda *xs: eval_jaxpr(open_jaxpr(jaxpr), jaxpr.consts, *xs)
        )(w, x)
        return relative_error(found, right)

    assert error(wide) <= 1.2 * error(closed)  # rounded before the sum alike


def test_what_a_matmul_takes_stays_half():
    """A cotangent that goes on to a matmul, and the sums that its bias takes."""

    def loss(params, x):
        h = jax.nn.relu(x @ params["w0"] + params["b0"]) @ params["w1"]
        return jnp.mean(h.astype(jnp.float32) ** 2)

    half = lambda *shape: jnp.ones(shape, jnp.bfloat16)
    params = {"w0": half(8, 8), "b0": half(8), "w1": half(8, 8)}

    def gradient(params, x):
        return jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(loss)(params, x))

    closed = jax.make_jaxpr(gradient)(params, half(6, 8))
    dots = [
        (eqn.outvars[0].aval.shape, str(dtype_of(eqn.outvars[0])))
        for eqn, _, _ in walk(widen_gradients(closed, 3, None))
        if eqn.primitive.name == "dot_general"
        and eqn.params.get("preferred_element_type")
    ]
    assert {dtype for shape, dtype in dots if shape == (6, 8)} >= {"bfloat16"}
