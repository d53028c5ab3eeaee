"""Real models: what half by hand and autocast compute in half, and a step of some."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tools import thinned

import mpjax
from experiments.benchmarks import _memory_by_hand as by_hand
from experiments.benchmarks.real_models import REAL_MODELS
from experiments.models.attention import einsum_attention, xla_attention
from experiments.models.gpt2 import GPT2
from experiments.models.moe import MoE
from mpjax._jaxpr.core import dtype_of, walk
from mpjax._jaxpr.flops import count_flops
from mpjax._jaxpr.primitives import facts_of

KEY = jax.random.key(0)


def shapes(workload, batch_size):
    """Returns shapes and dtypes of the arguments of a workload's loss function."""
    inits = [workload.init_params, workload.init_model_state]
    variables = [jax.eval_shape(init, KEY) for init in inits if init]
    batch = jax.eval_shape(lambda key: workload.make_batch(key, batch_size), KEY)
    return *variables, batch, KEY


def half_share(closed, dtype):
    """Returns the share of the matmul FLOPs whose operands have the dtype."""
    flops = {True: 0, False: 0}
    for eqn, _, times in walk(closed):
        if facts_of(eqn).is_matmul:
            is_half = {dtype_of(x) for x in eqn.invars[:2]} == {jnp.dtype(dtype)}
            flops[is_half] += times * count_flops(eqn)
    return flops[True] / sum(flops.values())


@pytest.mark.parametrize("name", thinned(REAL_MODELS, 4, rest="slow"))
def test_matmuls_are_half_by_hand_and_under_autocast(name):
    workload = REAL_MODELS[name]("small")
    args = shapes(workload, 2)
    grad = lambda loss_fn: jax.value_and_grad(loss_fn, has_aux=True)
    # By hand, the backward pass of `jax.nn.dot_product_attention` multiplies float32
    # cotangents of the logits. What else is float32 is the router of the experts, and
    # CTC's gathers by one-hot matmuls.
    cases = [
        (grad(workload.by_hand(jnp.bfloat16)), 0.93),
        (mpjax.autocast(grad(workload.loss_fn), "mixed_bfloat16"), 0.99),
    ]
    for fn, least in cases:
        closed, ((loss, _), grads) = jax.make_jaxpr(fn, return_shape=True)(*args)
        assert half_share(closed, "bfloat16") > least
        assert loss.dtype == jnp.float32
        assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
        assert jax.tree.structure(grads) == jax.tree.structure(args[0])


def test_float32_by_hand_has_no_half():
    workload = REAL_MODELS["gpt2_scan_remat"]("small")
    closed = jax.make_jaxpr(workload.by_hand(None))(*shapes(workload, 2))
    assert half_share(closed, "float32") == 1.0


@pytest.mark.parametrize("name", ["moe_ragged", "resnet50"])
@pytest.mark.weekly
def test_a_step_is_taken(name):
    """By hand and by autocast, from the same parameters on the same batch."""
    workload = REAL_MODELS[name]("small")
    batch = workload.make_batch(KEY, 2)
    init_model_state = workload.init_model_state or (lambda key: None)
    params, model_state = jax.jit(
        lambda key: (workload.init_params(key), init_model_state(key))
    )(KEY)
    losses = {}
    for step_name in ("float32", "by hand, bfloat16", "mixed_bfloat16"):
        step, _ = by_hand.make_step_by_name(workload, step_name)
        state = mpjax.TrainState.create(
            params=params,
            tx=mpjax.with_loss_scale(workload.tx),
            model_state=model_state,
        )
        state, metrics = step(state, batch)
        assert bool(metrics["grads_finite"])
        assert int(state.step) == 1
        losses[step_name] = float(metrics["loss"])
    full = losses.pop("float32")
    np.testing.assert_allclose(list(losses.values()), full, rtol=0.02)


def test_attention_functions_agree():
    """With fewer heads of keys and values than of queries."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(2, 8, num_heads, 4)).astype("float32")
        for num_heads in (4, 2, 2)
    )
    for causal in (True, False):
        einsum, xla = (
            jax.jit(functools.partial(attention, causal=causal))(q, k, v)
            for attention in (einsum_attention, xla_attention)
        )
        np.testing.assert_allclose(einsum, xla, rtol=1e-5, atol=1e-5)


def test_gpt2_takes_an_attention_function():
    """With any of the ways through its layers, whose function is the same."""
    seen = []

    def attention(query, key, value, causal):
        seen.append((query.shape, query.dtype, causal))
        return einsum_attention(query, key, value, causal)

    tokens = jnp.zeros((2, 6), jnp.int32)
    fields = {"vocabulary_size": 11, "max_length": 6, "width": 8}
    for ways in ({}, {"scan": True}, {"scan": True, "remat": True}):
        model = GPT2(
            **fields, num_layers=2, num_heads=2, attention=attention, dtype="float16"
        )
        model = model.clone(**ways)
        logits, _ = jax.eval_shape(model.init_with_output, KEY, tokens)
        assert (logits.shape, logits.dtype) == ((2, 6, 11), jnp.float16)
        assert set(seen) == {((2, 6, 2, 4), jnp.dtype("float16"), True)}
        seen.clear()


@pytest.mark.weekly
def test_dense_and_ragged_experts_agree_where_all_tokens_have_a_slot():
    x = np.random.default_rng(0).normal(size=(2, 16, 8)).astype("float32")
    # Enough slots for all tokens at one expert.
    dense = MoE(num_experts=4, num_hidden=16, capacity_factor=2.0)
    out, variables = jax.jit(dense.init_with_output)(KEY, x)
    ragged = MoE(num_experts=4, num_hidden=16, ragged=True)
    sorted_out = jax.jit(ragged.apply)(variables, x)
    np.testing.assert_allclose(sorted_out, out, rtol=1e-4, atol=1e-5)
