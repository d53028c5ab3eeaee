"""Frozen parameters: not differentiated, without optimizer state, never a skip."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import assert_same_bits

import mpjax
from mpjax import sharding
from mpjax._jaxpr.core import walk
from mpjax.numerics import find_nonfinite

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "base": {"kernel": jax.random.normal(KEYS[0], (4, 8)) / 2, "bias": jnp.zeros(8)},
    "head": {"kernel": jax.random.normal(KEYS[1], (8, 2)) / 3, "bias": jnp.zeros(2)},
}
BATCH = {
    "x": jax.random.normal(KEYS[2], (16, 4)),
    "label": jax.random.normal(KEYS[3], (16, 2)),
}


def predict(params, x):
    h = jax.nn.relu(x @ params["base"]["kernel"] + params["base"]["bias"])
    return h @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(params, batch, key):
    error = predict(params, batch["x"]) - batch["label"]
    return jnp.mean(error.astype(jnp.float32) ** 2)


def make(loss_fn=loss_fn, params=PARAMS, tx=None, trainable="head", **options):
    tx = mpjax.with_loss_scale(tx or optax.adamw(1e-2), mpjax.DynamicLossScale(2.0**8))
    ema = options.get("ema_decay") is not None
    state = mpjax.TrainState.create(params=params, tx=tx, trainable=trainable, ema=ema)
    step = mpjax.make_train_step(loss_fn, tx, donate=False, **options)
    return state, step


def trained(state, step, num=5, batch=BATCH):
    for _ in range(num):
        state, metrics = step(state, batch)
        assert bool(metrics["grads_finite"])
    return state


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    ("autocast", "num_microbatches"),
    [
        (True, 2),
        (False, 1),
        pytest.param(True, 1, marks=pytest.mark.slow),
        pytest.param(False, 2, marks=pytest.mark.slow),
    ],
)
def test_like_a_head_over_a_constant_base(policy, autocast, num_microbatches):
    """The same bits as a loss of the head alone, which closes over the base."""
    options = {
        "policy": policy,
        "autocast": autocast,
        "num_microbatches": num_microbatches,
    }
    after = trained(*make(**options))

    def head_loss(head, batch, key):
        base = PARAMS["base"]
        if not autocast:
            base = mpjax.get_policy(policy).cast_to_compute(base)
        return loss_fn({"base": base, "head": head}, batch, key)

    alone = trained(*make(head_loss, PARAMS["head"], trainable=None, **options))
    assert_same_bits(after.params["base"], PARAMS["base"])
    assert_same_bits(after.params["head"], alone.params)


def test_frozen_parameters_cost_nothing():
    """No optimizer state, and no matmul for their gradients."""
    state, _ = make()
    moments = state.opt_state.inner_state[0].mu
    assert [x.shape for x in jax.tree.leaves(moments)] == [(2,), (8, 2)]
    assert moments["base"] == {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode()}

    def num_matmuls(trainable):
        state, step = make(trainable=trainable)
        eqns = walk(jax.make_jaxpr(step)(state, BATCH))
        return sum(eqn.primitive.name == "dot_general" for eqn, _, _ in eqns)

    assert num_matmuls("head") == 3  # two forward, one for the gradient of the head
    assert num_matmuls("base") == 4
    assert num_matmuls(None) == 5


@pytest.mark.parametrize(
    "num_microbatches", [2, pytest.param(1, marks=pytest.mark.weekly)]
)
def test_an_overflow_of_what_is_frozen_skips_nothing(num_microbatches):
    """The square root's derivative at zero is Inf, for the base alone."""
    base = {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)}
    params = PARAMS | {"base": base}

    def loss_fn(params, batch, key):
        h = jnp.sqrt(batch["x"] @ params["base"]["kernel"] + params["base"]["bias"])
        error = h @ params["head"]["kernel"] + params["head"]["bias"] - batch["label"]
        return jnp.mean(error**2)

    options = {"policy": "float32", "num_microbatches": num_microbatches}
    state, step = make(loss_fn, params, trainable=None, **options)
    _, metrics = step(state, BATCH)
    assert not bool(metrics["grads_finite"])
    found = find_nonfinite(step)(state, BATCH)
    assert found.parameters == ("base/bias", "base/kernel")
    assert str(found).endswith(
        "Not finite are the gradients of base/bias, base/kernel."
    )
    guard = mpjax.NonFiniteGuard(mpjax.DynamicLossScale(1.0), max_consecutive_skipped=1)
    with pytest.raises(mpjax.NonFiniteTrainingError, match="of base/bias, base/kernel"):
        guard.check(metrics | {"loss_scale": 1.0}, lambda: found)

    frozen = trained(*make(loss_fn, params, **options))
    assert int(frozen.opt_state.num_skipped) == 0
    assert_same_bits(frozen.params["base"], base)
    assert not np.array_equal(frozen.params["head"]["bias"], params["head"]["bias"])


def test_expressions_and_predicates():
    chosen = lambda trainable: make(trainable=trainable)[0].trainable
    assert chosen(None) is None
    assert chosen("") == (True,) * 4
    assert chosen("head") == (False, False, True, True)
    assert chosen("kernel$") == (False, True, False, True)
    assert (
        chosen(lambda path: not path.startswith("base/k"))
        == (True, False) + (True,) * 2
    )


@pytest.mark.parametrize(
    ("trainable", "error", "words"),
    [
        ("haed", ValueError, "selects no parameter; their paths are base/bias, base/"),
        (lambda path: False, ValueError, "selects no parameter"),
        ("(", ValueError, "is not a regular expression"),
        ({"head": True}, TypeError, "a regular expression or a function of a param"),
    ],
)
def test_what_selects_nothing_is_refused(trainable, error, words):
    with pytest.raises(error, match=words):
        make(trainable=trainable)


def test_parameters_of_another_tree_are_refused():
    state, step = make()
    state = state.replace(params=PARAMS | {"more": jnp.ones(3)})
    with pytest.raises(ValueError, match="for 4 parameters, but holds 5"):
        step(state, BATCH)


def test_averages_evaluation_and_optimizers_by_label():
    labels = {"base": "slow", "head": {"kernel": "fast", "bias": "slow"}}
    tx = optax.multi_transform({"fast": optax.sgd(0.1), "slow": optax.sgd(0.0)}, labels)
    state, step = make(tx=tx, ema_decay=0.9, policy="float32")
    after = trained(state, step, 1)
    assert_same_bits(after.ema_params["base"], PARAMS["base"])
    assert not np.array_equal(
        after.ema_params["head"]["kernel"], PARAMS["head"]["kernel"]
    )
    assert_same_bits(after.params["head"]["bias"], PARAMS["head"]["bias"])
    evaluate = mpjax.make_eval_step(lambda p, b: predict(p, b["x"]), policy="float32")
    np.testing.assert_allclose(
        evaluate(after, BATCH), predict(after.params, BATCH["x"]), rtol=1e-6
    )


def test_low_rank_adapters_of_half_weights():
    """LoRA (arXiv:2106.09685): frozen bfloat16 weights, trained float32 adapters."""
    params = {
        "kernel": PARAMS["base"]["kernel"].astype(jnp.bfloat16),
        "lora_a": jax.random.normal(jax.random.key(1), (4, 2)) / 2,
        "lora_b": jnp.zeros((2, 8)),
    }

    def loss_fn(params, batch, key):
        out = batch["x"] @ params["kernel"]
        out += batch["x"] @ params["lora_a"] @ params["lora_b"]
        return jnp.mean((out[:, :2] - batch["label"]) ** 2)

    state, step = make(loss_fn, params, trainable="lora", policy="mixed_bfloat16")
    first = float(step(state, BATCH)[1]["loss"])
    state = trained(state, step, 50)
    assert float(step(state, BATCH)[1]["loss"]) < 0.95 * first
    assert_same_bits(state.params["kernel"], params["kernel"])
    assert {x.dtype for x in jax.tree.leaves(state.opt_state.inner_state[0].mu)} == {
        jnp.dtype("float32")
    }


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_on_a_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    state, step = make(mesh=mesh, policy="float32")
    batch = sharding.shard_batch(BATCH, mesh)
    after = trained(sharding.shard_state(state, mesh), step, 3, batch)
    alone = trained(*make(policy="float32"), 3)
    assert_same_bits(after.params["base"], PARAMS["base"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        after.params,
        alone.params,
    )
