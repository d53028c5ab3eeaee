"""The cost of training steps, compiled for an H100 that the machine need not have."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.cells import layer, over
from helpers.tools import thinned
from jax.experimental.layout import Format, Layout

import mpjax
from experiments.benchmarks import memory
from experiments.benchmarks.workloads import WORKLOADS
from mpjax import cost
from mpjax._autocast import pipeline
from mpjax._jaxpr.passes import apply_passes
from mpjax._train import gradients
from mpjax._xla_cpu.convolutions import put_channels_last

pytestmark = pytest.mark.h100
SIZES = [
    pytest.param("mlp", 2048, marks=pytest.mark.weekly),
    ("mlp", 8192),
    pytest.param("convnet", 4096, marks=pytest.mark.weekly),
    pytest.param("transformer_block", 16, marks=pytest.mark.weekly),
    ("transformer", 16),
    pytest.param("bigru", 256, marks=pytest.mark.weekly),
]


@pytest.mark.parametrize(("name", "batch_size"), SIZES)
def test_half_takes_at_most_three_fifths_of_the_temporaries(name, batch_size):
    runs = memory.measure(name, WORKLOADS[name](), batch_size, "h100")
    ratios = {run["name"]: run["temporaries_ratio"] for run in runs}
    assert ratios["mixed_float16"] <= 0.60
    assert ratios["mixed_bfloat16"] <= 0.60


def test_a_loss_in_a_jit_of_its_own_costs_the_same():
    work = WORKLOADS["bigru"]()
    jitted = dataclasses.replace(work, loss_fn=jax.jit(work.loss_fn))
    alone, inside = (
        report_of(each, "mixed_bfloat16", batch_size=256) for each in (work, jitted)
    )
    assert inside.temporary_bytes == alone.temporary_bytes
    assert inside.moved_bytes == alone.moved_bytes


@pytest.mark.parametrize("policy", thinned(["mixed_float16", "mixed_bfloat16"]))
def test_dynamic_loss_scaling_moves_nothing_more(policy):
    work = WORKLOADS["mlp"]()
    plain, dynamic = (
        report_of(work, policy, scale)
        for scale in (mpjax.NoOpLossScale(), mpjax.DynamicLossScale())
    )
    assert dynamic.moved_bytes <= 1.01 * plain.moved_bytes
    assert dynamic.temporary_bytes <= 1.01 * plain.temporary_bytes


def test_a_scan_over_layers_takes_a_third_of_float32s_temporaries():
    """It takes less than by hand in pure bfloat16, by `mpjax._autocast.residuals`."""
    num_layers, width = 6, 256
    w = jax.ShapeDtypeStruct((2, width, 4 * width), "float32")
    x = jax.ShapeDtypeStruct((1024, width), "float32")
    gains = jax.ShapeDtypeStruct((num_layers, width), "float32")

    def grad(w, x, gains):
        return jax.grad(lambda w: over(layer, x)(w, gains))(w)

    def by_hand(*args):
        return grad(*jax.tree.map(lambda x: x.astype(jnp.bfloat16), args))

    float32, hand_cast, cast = (
        cost.analyze(fn, w, x, gains, device="h100").temporary_bytes
        for fn in (grad, by_hand, mpjax.autocast(grad))
    )
    assert cast <= 0.35 * float32
    assert cast <= 0.70 * hand_cast


def test_changes_that_do_not_pay_on_an_h100():
    """experiments/benchmarks/baselines/tuned.py therefore does not time them."""
    work = WORKLOADS["mlp"]()
    scale = mpjax.DynamicLossScale()
    plain = report_of(work, "mixed_bfloat16", scale)
    auto = Format(Layout.AUTO)
    layouts = {"donate_argnums": 0, "in_shardings": auto, "out_shardings": auto}
    chosen = report_of(work, "mixed_bfloat16", scale, lambda f: jax.jit(f, **layouts))
    assert chosen.moved_bytes >= 0.999 * plain.moved_bytes
    one_vector = dataclasses.replace(work, tx=optax.flatten(work.tx))
    flat = report_of(one_vector, "mixed_bfloat16", scale)
    assert flat.moved_bytes >= 1.1 * plain.moved_bytes
    x = jax.ShapeDtypeStruct((64, 64), "float16")
    with pytest.raises(RuntimeError, match="ALG_DOT_F16_F16_F16"):
        cost.analyze(
            lambda x: jnp.matmul(x, x, precision="F16_F16_F16"), x, device="h100"
        )


@pytest.mark.parametrize("form", [("NHWC", "HWIO"), ("NCHW", "OIHW")])
@pytest.mark.parametrize("dtype", thinned(["bfloat16", "float32"]))
def test_plain_convolutions_cost_nothing(form, dtype):
    """The transposes of `mpjax._xla_cpu.convolutions` move nothing in memory."""
    last = form[0] == "NHWC"
    image = (256, 56, 56, 64) if last else (256, 64, 56, 56)
    kernel = (3, 3, 64, 64) if last else (64, 64, 3, 3)
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in (image, kernel, kernel)]

    def loss(x, *kernels):
        for w in kernels:
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x, w, (1, 1), "SAME", dimension_numbers=(*form, form[0])
                )
            )
        return jnp.mean(x.astype("float32") ** 2)

    grad = jax.grad(loss, (1, 2))
    plain, found = (
        cost.analyze(fn, *args, device="h100")
        for fn in (apply_passes(grad, put_channels_last), grad)
    )
    assert plain.moved_bytes == found.moved_bytes
    assert plain.temporary_bytes == found.temporary_bytes


@pytest.mark.parametrize("autocast", [True, False])
def test_microbatches_cast_weights_once(autocast, monkeypatch):
    def moved_bytes():
        how = {"num_microbatches": 4, "autocast": autocast}
        return report_of(WORKLOADS["mlp"](), "mixed_bfloat16", **how).moved_bytes

    once = moved_bytes()
    hoist = gradients.hoist_casts_out_of_scans
    monkeypatch.setattr(gradients, "hoist_casts_out_of_scans", lambda jaxpr: jaxpr)
    others = tuple(run for run in pipeline.PASSES if run is not hoist)
    assert len(others) == len(pipeline.PASSES) - 1
    monkeypatch.setattr(pipeline, "PASSES", others)
    assert once <= 0.915 * moved_bytes()


def report_of(
    work,
    policy,
    loss_scale=None,
    jit=lambda step: step,
    *,
    batch_size=8192,
    **kwargs,
):
    step, state = memory.make_step(work, policy, loss_scale=loss_scale, **kwargs)
    make_batch = lambda key: work.make_batch(key, batch_size)
    batch = jax.eval_shape(make_batch, jax.random.key(0))
    return cost.analyze(jit(step), state, batch, device="h100")
