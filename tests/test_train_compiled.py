"""The compiled step: dtypes, one trace, donated memory, no calls to the host."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.tools import batch_norm_model, regression_batch, rich_optimizer

import mpjax
from mpjax._jaxpr.core import walk
from mpjax._tree import is_key


def mlp_loss(params, batch, key):
    x = batch["x"]
    for w in params:
        x = jax.nn.relu(x @ w)
    return jnp.mean((x.astype(jnp.float32) - batch["label"][:, None]) ** 2), None


def mlp(policy, *, donate=True, **kwargs):
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = [(4, 64), (64, 64)]
    params = [jax.random.normal(k, s) / 8 for k, s in zip(keys, shapes, strict=True)]
    tx = mpjax.with_loss_scale(rich_optimizer())
    state = mpjax.TrainState.create(params=params, tx=tx, ema=True)
    step = mpjax.make_train_step(
        mlp_loss,
        tx,
        policy=policy,
        ema_decay=0.99,
        donate=donate,
        **kwargs,
    )
    return state, step


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [("float32", "f32"), ("mixed_float16", "f16"), ("mixed_bfloat16", "bf16")],
)
@pytest.mark.parametrize("autocast", [True, False])
def test_every_matmul_is_in_the_compute_dtype(policy, dtype, autocast):
    state, step = mlp(policy, autocast=autocast)
    text = step.lower(state, regression_batch()).as_text()
    dots = re.findall(r"dot_general.*: \((.*?)\) -> (tensor<.*>)", text)
    dots = [dot for dot in dots if dot[1] != "tensor<f32>"]  # the gradient norm
    assert len(dots) == 5  # two forward, two weight gradients, one input gradient
    for operands, output in dots:
        found = re.findall(r"(b?f\d+)>", operands + output)
        assert set(found) == {dtype}


@pytest.mark.parametrize("autocast", [True, False])
def test_weights_are_cast_once_for_all_microbatches(autocast):
    state, step = mlp("mixed_float16", autocast=autocast, num_microbatches=2)
    casts = [
        times
        for eqn, _, times in walk(jax.make_jaxpr(step)(state, regression_batch()))
        if eqn.primitive.name == "convert_element_type"
        and eqn.invars[0].aval in [jax.typeof(w) for w in state.params]
        and eqn.outvars[0].aval.dtype == jnp.float16
    ]
    assert casts == [1] * len(state.params)


@pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.__version_info__ < (0, 12),
    reason="a hint for XLA:CPU, which copies in any case before jax 0.12",
)
@pytest.mark.parametrize("optimizer", [optax.rmsprop, optax.adam])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_cpu_writes_parameters_and_moments_in_place(optimizer, policy):
    """Each is computed once, into its own memory: no copy, no second buffer."""
    size = 256
    tx = mpjax.with_loss_scale(optimizer(1e-3))
    params = [jnp.ones((size, size))] * 2
    state = mpjax.TrainState.create(params=params, tx=tx)
    step = mpjax.make_train_step(mlp_loss, tx, policy=policy)
    batch = {"x": jnp.ones((128, size)), "label": jnp.ones(128)}
    compiled = step.lower(state, batch).compile()
    written = re.findall(
        rf"= f32\[{size},{size}\]\S* (fusion|copy)\(", compiled.as_text()
    )
    arrays = [x for x in jax.tree.leaves(state) if x.shape == (size, size)]
    assert written == ["fusion"] * len(arrays)
    bound = {"float32": 3.75, "mixed_bfloat16": 2.5}[policy]
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < bound * arrays[0].nbytes


def test_parameters_moments_and_metrics_are_float32():
    state, step = mlp("mixed_float16")
    state, metrics = step(state, regression_batch())
    floats = [
        x.dtype
        for x in jax.tree.leaves((state, metrics))
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert set(floats) == {jnp.dtype("float32")}


@pytest.mark.parametrize("make", ["mlp", "batch_norm", "half"])
def test_the_step_is_traced_once(make):
    """Weakly typed parameters, dropped steps, a growing scale: still one trace."""
    num_traces = 0

    def counted(loss_fn):
        def loss(*args):
            nonlocal num_traces
            num_traces += 1
            return loss_fn(*args)

        return loss

    scale = mpjax.DynamicLossScale(2.0**8, growth_interval=2)
    if make == "batch_norm":
        params, model_state, loss_fn = batch_norm_model()
        tx = mpjax.with_loss_scale(rich_optimizer(), scale)
    else:
        model_state, loss_fn = None, mlp_loss
        params = [jnp.full((4, 4), 1.0), jnp.full((4, 1), 0.5)]
        params = [jnp.asarray(1.0) * p for p in params]
        tx = mpjax.with_loss_scale(optax.inject_hyperparams(optax.adam)(0.1), scale)
        if make == "half":
            params = jax.tree.map(lambda p: p.astype(jnp.float16), params)
            tx = mpjax.with_loss_scale(
                mpjax.with_master_weights(optax.adam(0.1)), scale
            )
    state = mpjax.TrainState.create(params=params, tx=tx, model_state=model_state)
    step = mpjax.make_train_step(counted(loss_fn), tx)
    for seed in range(6):
        spike = float("nan") if seed == 3 else None
        state, metrics = step(state, regression_batch(seed=seed, spike=spike))
    assert int(metrics["num_skipped"]) == 1
    assert num_traces == 1


def test_the_whole_state_is_donated():
    state, step = mlp("mixed_float16")
    leaves = jax.tree.leaves(state)
    batch = regression_batch()
    text = step.lower(state, batch).compile().as_text()
    (aliases,) = re.findall(r"input_output_alias=\{(.*)\}, entry", text)
    # The step reads every leaf of the state; each has an output in its memory, but
    # for a few bytes of the loss scale's flag and num_finite_steps.
    num_aliases = len(re.findall(r"may-alias|must-alias", aliases))
    assert num_aliases >= len(leaves) - 1
    memory = step.lower(state, batch).compile().memory_analysis()
    state_bytes = sum(x.nbytes for x in leaves if not is_key(x))
    assert memory.alias_size_in_bytes >= 0.99 * state_bytes
    pointers = {x.unsafe_buffer_pointer() for x in state.params}
    new_state, _ = step(state, batch)
    assert {x.unsafe_buffer_pointer() for x in new_state.params} == pointers
    assert all(x.is_deleted() for x in state.params)


def test_donation_spares_the_callers_parameters():
    params = [jnp.ones((4, 8)), jnp.ones((8, 1))]
    tx = mpjax.with_loss_scale(optax.contrib.schedule_free_sgd(0.1))
    state = mpjax.TrainState.create(params=params, tx=tx, ema=True)
    pointers = [
        x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if not is_key(x)
    ]
    assert len(set(pointers)) == len(pointers)
    step = mpjax.make_train_step(mlp_loss, tx, ema_decay=0.9)
    step(state, regression_batch())
    assert float(params[0].sum()) == 32


def test_without_donation_the_state_stays():
    state, step = mlp("mixed_float16", donate=False)
    step(state, regression_batch())
    assert all(not x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.__version_info__ < (0, 12),
    reason="hints for a CPU, which XLA takes since then",
)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_on_a_cpu_moments_are_updated_in_place(policy):
    width = 256
    tx = mpjax.with_loss_scale(optax.adam(1e-3))
    params = [jnp.zeros((width, width))]
    state = mpjax.TrainState.create(params=params, tx=tx, ema=True)
    step = mpjax.make_train_step(mlp_loss, tx, policy=policy, ema_decay=0.99)
    batch = {"x": jnp.ones((2, width)), "label": jnp.ones(2)}
    text = step.lower(state, batch).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert not re.findall(rf"f32\[{width},{width}\]\S* copy\(", entry)
    if policy == "mixed_bfloat16":
        # The norm and the optimizer each read the half gradient; nothing keeps it in
        # float32.
        assert not re.findall(rf"convert\S* = f32\[{width},{width}\]", entry)


def test_nothing_crosses_between_host_and_device():
    state, step = mlp("mixed_float16")
    batches = [
        regression_batch(seed=s, spike=[None, jnp.inf][s == 1]) for s in range(4)
    ]
    state, metrics = step(state, batches[0])
    with jax.transfer_guard("disallow"):
        for batch in batches[1:]:
            state, metrics = step(state, batch)
    assert int(metrics["num_skipped"]) == 1


def test_the_compiled_step_calls_no_host():
    state, step = mlp("mixed_float16")
    text = step.lower(state, regression_batch()).compile().as_text()
    assert not re.findall(r"outfeed|infeed|custom-call.*callback|host_compute", text)


def test_rules_choose_the_dtype_per_parameter():
    rules = mpjax.PolicyRules([("params/1", "float32")], default="mixed_float16")
    state, step = mlp(rules, autocast=False)
    text = step.lower(state, regression_batch()).as_text()
    dots = re.findall(r"dot_general.*: \((.*?)\) ->", text)
    kinds = [set(re.findall(r"(b?f\d+)>", operands)) for operands in dots]
    assert kinds.count({"f16"}) == 2
    assert rules.unused_rules() == ()


def test_rules_choose_the_dtype_per_scope():
    def loss_fn(params, batch, key):
        with jax.named_scope("body"):
            h = jax.nn.relu(batch["x"] @ params[0])
        with jax.named_scope("head"):
            return jnp.mean(h @ params[1]), None

    rules = mpjax.PolicyRules([("head", "float32")], default="mixed_float16")
    state, _ = mlp(rules)
    tx = mpjax.with_loss_scale(rich_optimizer())
    step = mpjax.make_train_step(loss_fn, tx, policy=rules, ema_decay=0.9)
    text = step.lower(state, regression_batch()).as_text()
    dots = re.findall(r"dot_general.*: \((.*?)\) ->", text)
    kinds = [set(re.findall(r"(b?f\d+)>", operands)) for operands in dots]
    assert sorted(map(tuple, kinds)) == [("f16",), ("f16",), *[("f32",)] * 3]


@pytest.mark.parametrize("autocast", [True, False])
def test_a_rule_that_matches_nothing_is_reported(autocast):
    rules = mpjax.PolicyRules([("hed", "float32")], default="mixed_float16")
    state, step = mlp(rules, autocast=autocast)
    with pytest.warns(UserWarning, match="'hed' match no"):
        step(state, regression_batch())
