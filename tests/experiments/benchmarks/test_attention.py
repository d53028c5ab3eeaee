"""The --attention flag: what each row's attention calls, and where it may."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tools import thinned

import mpjax
from experiments.benchmarks import _memory_by_hand as by_hand
from experiments.benchmarks import memory, speed
from experiments.benchmarks._attention import (
    attention_in,
    choose_attention,
    with_attention,
)
from experiments.benchmarks._train_steps import measure_cost
from experiments.benchmarks.real_models import REAL_MODELS
from experiments.benchmarks.workloads import mlp, transformer, transformer_block
from experiments.harness.errors import ConfigError
from experiments.models import attention, small
from mpjax.cost import _analyze

KEY = jax.random.key(0)
TRANSFORMERS = ("gpt2_scan", "llama", "llama_sdpa", "gpt2_scan_remat")
HALF_ROWS = ("by hand, bfloat16", "mixed_bfloat16")


@pytest.mark.parametrize("benchmark", [memory, speed])
def test_a_wrong_value_is_reported(benchmark):
    with pytest.raises(ConfigError, match=r"one of auto, xla, cudnn, got 'flash'"):
        benchmark.Config(attention="flash")
    assert benchmark.Config().attention == "auto"


def test_auto_is_cudnn_on_a_gpu_that_supports_it():
    for device in ("a100", "h100", "b200"):
        assert choose_attention("auto", device) == "cudnn"
        assert choose_attention("xla", device) == "xla"
    for device in ("v100", None):
        assert choose_attention("auto", device) == "xla"
        with pytest.raises(ConfigError, match=r"compute capability 8 .* auto or xla"):
            choose_attention("cudnn", device)
    with pytest.raises(ConfigError, match="V100"):
        memory.main(memory.Config(device="v100", attention="cudnn"))
    with pytest.raises(ConfigError, match="cpu"):
        speed.main(speed.Config(attention="cudnn"))


def test_transformers_have_an_attention_to_choose():
    for workload in (transformer(64, 16, 2), REAL_MODELS["gpt2"]("small")):
        assert with_attention(workload, "xla") is workload
        assert workload.attention == "xla"
        assert with_attention(workload, "cudnn").attention == "cudnn"
    other = mlp(8)
    assert with_attention(other, "cudnn") is other
    assert attention_in(other, lambda: "__cudnn$fmhaSoftmax") is None


@pytest.fixture
def kernel(monkeypatch):
    """Replaces cuDNN's kernel, which exists only on a GPU; lists dtypes it is given."""
    seen = []

    def attend(query, key, value, *, is_causal, implementation):
        if implementation == "cudnn":
            seen.append(query.dtype.name)
            assert query.dtype == key.dtype == value.dtype
            return attention.einsum_attention(query, key, value, is_causal)
        return plain(
            query, key, value, is_causal=is_causal, implementation=implementation
        )

    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return seen


def dtypes_seen(kernel, step, *args):
    kernel.clear()
    jax.eval_shape(step, *args)
    return set(kernel)


@pytest.mark.parametrize("name", thinned(TRANSFORMERS, 9, rest="slow"))
def test_half_rows_call_the_kernel_and_float32_rows_do_not(kernel, name):
    workload = REAL_MODELS[name]("small").with_cudnn()
    batch = jax.eval_shape(lambda key: workload.make_batch(key, 2), KEY)
    rows = {"float32": set(), **{row: {"bfloat16"} for row in HALF_ROWS}}
    for row, dtypes in rows.items():
        kernel.clear()
        step, state = by_hand.make_step_by_name(workload, row)
        assert not kernel  # Parameters are initialized in float32.
        assert dtypes_seen(kernel, step, state, batch) == dtypes


def test_transformers_in_a_scan_call_the_kernel_in_half(kernel):
    workload = transformer(128, 16, 2).with_cudnn()
    params = workload.init_params(KEY)
    batch = workload.make_batch(KEY, 2)
    loss = lambda params, batch: workload.loss_fn(params, batch, KEY)[0]
    assert dtypes_seen(kernel, loss, params, batch) == set()
    cast = mpjax.autocast(loss, "mixed_float16")
    assert dtypes_seen(kernel, cast, params, batch) == {"float16"}
    for dtype in ("float16", "bfloat16"):
        half = small.hand_cast(loss, jnp.dtype(dtype))
        assert dtypes_seen(kernel, half, params, batch) == {dtype}


def test_the_kernel_computes_what_the_plain_attention_does(kernel):
    plain = transformer_block(128, 16)
    params, batch = plain.init_params(KEY), plain.make_batch(KEY, 2)
    losses = []
    for workload in (plain, plain.with_cudnn()):
        loss = lambda params, batch, w=workload: w.loss_fn(params, batch, KEY)[0]
        losses.append(jax.jit(small.hand_cast(loss, jnp.float16))(params, batch))
    assert kernel
    # Without the causal mask the losses differ by 5%.
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_shapes_that_the_kernel_does_not_take_have_the_plain_attention(kernel):
    attend = attention.kernel_in_half(
        attention.cudnn_attention, attention.flax_attention
    )
    taken, refused = [(4, 8), (6, 128)], [(4, 12), (4, 136), (5, 8)]
    for length, depth in taken + refused:
        heads = jax.ShapeDtypeStruct((1, length, 3, depth), jnp.float16)
        seen = dtypes_seen(kernel, lambda x: attend(x, x, x, True), heads)
        assert bool(seen) == ((length, depth) in taken)


CASES = {
    "gpt2": lambda: REAL_MODELS["gpt2"]("small"),
    "transformer": lambda: transformer(128, 256, 2),
}


@pytest.mark.h100
@pytest.mark.weekly
@pytest.mark.parametrize("name", thinned(CASES, 2, rest="weekly"))
def test_cudnn_in_code_compiled_for_an_h100(name, monkeypatch):
    texts, compile_for = [], _analyze.compile_for

    def compile_and_keep(*args):
        compiled = compile_for(*args)
        texts.append(compiled.as_text())
        return compiled

    monkeypatch.setattr(_analyze, "compile_for", compile_and_keep)
    plain = CASES[name]()
    cudnn = with_attention(plain, choose_attention("cudnn", "h100"))
    xla_row, *cudnn_rows = (
        measure_cost(workload, *by_hand.make_step_by_name(workload, row), 8, "h100")
        for workload, row in (
            (plain, "mixed_bfloat16"),
            (cudnn, "mixed_bfloat16"),
            *([(cudnn, "by hand, bfloat16")] if cudnn.by_hand else []),
        )
    )
    assert xla_row["attention"] == "xla"
    xla_text, *cudnn_texts = texts
    assert "__cudnn$fmha" not in xla_text
    assert len(cudnn_rows) == len(cudnn_texts) == 1 + bool(cudnn.by_hand)
    for row, text in zip(cudnn_rows, cudnn_texts, strict=True):
        assert row["attention"] == "cudnn"
        assert row["temporaries_mb"] < 0.9 * xla_row["temporaries_mb"]
        for call in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
            assert f'"{call}"' in text
