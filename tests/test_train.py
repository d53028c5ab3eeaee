"""The train step: what it computes, what it leaves alone on a skip, what it refuses."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import (
    assert_same_bits,
    batch_norm_model,
    everything,
    leaf_bytes,
    regression_batch,
    rich_optimizer,
    thinned,
)

import mpjax
from mpjax._jaxpr.core import walk

PARAMS = {"w": jnp.linspace(-1, 1, 4), "b": jnp.zeros(())}


def linear_loss(params, batch, key):
    del key
    out = batch["x"] @ params["w"] + params["b"]
    error = out.astype(jnp.float32) - batch["label"]
    return jnp.mean(error**2), {"num_examples": error.size, "mae": abs(error).mean()}


def rich_state(tx, *, ema=True):
    params, model_state, loss_fn = batch_norm_model()
    state = mpjax.TrainState.create(
        params=params, tx=tx, model_state=model_state, ema=ema, key=jax.random.key(3)
    )
    return state, loss_fn


def rich_step(num_microbatches=2, **kwargs):
    tx = mpjax.with_loss_scale(rich_optimizer())
    state, loss_fn = rich_state(tx)
    step = mpjax.make_train_step(
        loss_fn, tx, ema_decay=0.9, num_microbatches=num_microbatches, **kwargs
    )
    return state, step


@pytest.mark.parametrize("spike", [np.inf, np.nan, 6e4])
@pytest.mark.parametrize("num_microbatches", thinned([4, 1]))
def test_nothing_moves_on_an_overflow(spike, num_microbatches):
    """adam + cosine schedule + clipping + decay + BatchNorm + EMA + microbatches."""
    state, step = rich_step(num_microbatches, donate=False)
    for seed in range(3):
        state, metrics = step(state, regression_batch(seed=seed))
        assert bool(metrics["grads_finite"])
    after, metrics = step(state, regression_batch(seed=9, spike=spike))
    assert not bool(metrics["grads_finite"])
    assert_same_bits(everything(after), everything(state))
    assert leaf_bytes(after.key) != leaf_bytes(state.key)
    assert float(metrics["loss_scale"]) == 2.0**15
    assert (
        float(mpjax.loss_scale_state(after.opt_state).loss_scale.loss_scale) == 2.0**14
    )
    assert int(metrics["num_skipped"]) == 1
    moved, metrics = step(after, regression_batch(seed=10))
    assert bool(metrics["grads_finite"])
    names = leaf_bytes(everything(moved))
    still = [n for n, b in leaf_bytes(everything(after)).items() if names[n] == b]
    assert still == []
    assert int(moved.step) == 4


def test_nothing_moves_under_scan():
    state, step = rich_step(donate=False)
    good = [regression_batch(seed=seed) for seed in range(3)]
    bad = regression_batch(seed=9, spike=np.inf)
    stack = lambda batches: jax.tree.map(lambda *x: jnp.stack(x), *batches)
    run = jax.jit(lambda s, b: jax.lax.scan(step, s, b))
    once, _ = run(state, stack([*good, bad]))
    twice, metrics = run(state, stack([*good, bad, bad, bad]))
    assert_same_bits(everything(twice), everything(once))
    assert metrics["grads_finite"].tolist() == [True] * 3 + [False] * 3
    assert int(twice.step) == 3


def test_minus_zero_stays_minus_zero():
    """p + 0 would turn -0.0 into 0.0."""
    tx = mpjax.with_loss_scale(optax.sgd(1.0))
    state = mpjax.TrainState.create(params={"w": jnp.array([-0.0])}, tx=tx)
    step = mpjax.make_train_step(lambda p, b, k: (p["w"][0] * b, None), tx)
    state, metrics = step(state, jnp.float32(jnp.inf))
    assert not bool(metrics["grads_finite"])
    assert np.signbit(np.asarray(state.params["w"]))[0]


def test_what_wraps_the_loss_scale_stays_too():
    """A decay and a schedule outside of with_loss_scale would move on zero updates."""
    tx = optax.chain(
        mpjax.with_loss_scale(optax.sgd(0.1), mpjax.StaticLossScale(128.0)),
        optax.add_decayed_weights(0.5),
        optax.scale_by_schedule(lambda count: 1.0 / (1 + count)),
    )
    state = mpjax.TrainState.create(params=PARAMS, tx=tx)
    step = mpjax.make_train_step(linear_loss, tx, donate=False)
    state, metrics = step(state, regression_batch())
    assert bool(metrics["grads_finite"])
    after, _ = step(state, regression_batch(spike=np.nan))
    assert_same_bits(everything(after), everything(state))
    assert int(mpjax.loss_scale_state(after.opt_state).num_skipped) == 1


def test_a_model_state_that_overflows_skips_the_step():
    """Finite gradients, but BatchNorm-like statistics that would stay infinite."""
    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    state = mpjax.TrainState.create(
        params={"w": jnp.ones(1)},
        tx=tx,
        model_state={"peak": jnp.zeros(()), "limit": jnp.float32(jnp.inf)},
    )

    def loss_fn(params, model_state, batch, key):
        new = {**model_state, "peak": model_state["peak"] + batch["peak"]}
        return params["w"][0].astype(jnp.float32), (new, None)

    step = mpjax.make_train_step(loss_fn, tx, donate=False, no_cast_inputs="peak")
    state, metrics = step(state, {"peak": jnp.float32(1)})
    assert bool(metrics["grads_finite"])  # an infinity of the old state is no overflow
    after, metrics = step(state, {"peak": jnp.float32(jnp.inf)})
    assert not bool(metrics["grads_finite"])
    assert_same_bits(everything(after), everything(state))


def test_float32_step_is_the_hand_written_one():
    tx = mpjax.with_loss_scale(rich_optimizer(), mpjax.NoOpLossScale())
    state = mpjax.TrainState.create(params=PARAMS, tx=tx)
    step = mpjax.make_train_step(linear_loss, tx, policy="float32")
    params, plain = PARAMS, rich_optimizer()
    opt_state = plain.init(params)
    for seed in range(5):
        batch = regression_batch(seed=seed)
        state, metrics = step(state, batch)
        grad_fn = jax.value_and_grad(linear_loss, has_aux=True)
        (loss, aux), grads = grad_fn(params, batch, None)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        np.testing.assert_allclose(metrics["mae"], aux["mae"], rtol=1e-6)
        np.testing.assert_allclose(
            metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5
        )
        updates, opt_state = plain.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    for name in params:
        np.testing.assert_allclose(state.params[name], params[name], rtol=1e-5)
    assert int(state.step) == 5


@pytest.mark.parametrize("num_microbatches", [1, 2, 8])
def test_microbatches_give_the_whole_batch_gradient(num_microbatches):
    tx = mpjax.with_loss_scale(optax.sgd(1.0))
    state = mpjax.TrainState.create(params=PARAMS, tx=tx)
    step = mpjax.make_train_step(
        linear_loss, tx, policy="float32", num_microbatches=num_microbatches
    )
    batch = regression_batch()
    state, metrics = step(state, batch)
    (loss, aux), grads = jax.value_and_grad(linear_loss, has_aux=True)(
        PARAMS, batch, None
    )
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["mae"], aux["mae"], rtol=1e-6)
    assert int(metrics["num_examples"]) == 16
    expected = jax.tree.map(lambda p, g: p - g, PARAMS, grads)
    for name in expected:
        np.testing.assert_allclose(state.params[name], expected[name], atol=1e-6)


def test_microbatch_gradients_are_added_in_float32():
    """4096 gradients of 1 add up to 4096, where float16 stops at 2048."""
    tx = mpjax.with_loss_scale(optax.sgd(1.0), mpjax.NoOpLossScale())
    state = mpjax.TrainState.create(params={"w": jnp.zeros(())}, tx=tx)
    step = mpjax.make_train_step(
        lambda p, b, k: ((p["w"] * b.sum() * 4096), None), tx, num_microbatches=4096
    )
    state, _ = step(state, jnp.ones(4096, jnp.int32))
    assert float(state.params["w"]) == -4096


def test_without_jit_a_loss_that_casts_sees_concrete_values():
    def loss_fn(params, batch, key):
        loss, aux = linear_loss(params, batch, key)
        return loss, aux | {"seen": float(batch["x"].sum())}

    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    state = mpjax.TrainState.create(params=PARAMS, tx=tx)
    step = mpjax.make_train_step(loss_fn, tx, autocast=False, num_microbatches=2)
    batch = regression_batch()
    with jax.disable_jit():
        _, metrics = step(state, batch)
    expected = np.float32(batch["x"].astype(np.float16).sum() / 2)
    np.testing.assert_allclose(metrics["seen"], expected, rtol=1e-2)


def test_keys_differ_by_step_and_microbatch_and_follow_the_seed():
    tx = mpjax.with_loss_scale(optax.sgd(0.0))

    def loss_fn(params, batch, key):
        return params["b"] * 0, {"draw": jax.random.randint(key, (), 0, 2**20)}

    def draws(seed):
        state = mpjax.TrainState.create(params=PARAMS, tx=tx, key=jax.random.key(seed))
        step = mpjax.make_train_step(loss_fn, tx, num_microbatches=2)
        seen = []
        for _ in range(4):
            state, metrics = step(state, jnp.ones(2))
            seen.append(int(metrics["draw"]))
        return seen

    assert draws(1) == draws(1) != draws(2)
    assert len(set(draws(1))) == 4


def test_ema_moves_in_float32_where_half_would_not():
    tx = mpjax.with_loss_scale(optax.sgd(1.0), mpjax.NoOpLossScale())
    params = {"w": jnp.ones((), jnp.float16)}
    state = mpjax.TrainState.create(params=params, tx=tx, ema=True)
    assert state.ema_params["w"].dtype == jnp.float32
    step = mpjax.make_train_step(
        lambda p, b, k: (-p["w"].astype(jnp.float32) * b, None),
        tx,
        policy="float16",
        ema_decay=0.9999,
    )
    expected = 1.0
    for _ in range(5):
        state, _ = step(state, jnp.float32(1))
        expected += (1 - 0.9999) * (float(state.params["w"]) - expected)
    assert expected > 1
    np.testing.assert_allclose(state.ema_params["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_eval_step(autocast):
    make_eval_step = functools.partial(mpjax.make_eval_step, autocast=autocast)
    tx = mpjax.with_loss_scale(optax.sgd(0.5))
    state = mpjax.TrainState.create(params=PARAMS, tx=tx, ema=True)
    step = mpjax.make_train_step(linear_loss, tx, ema_decay=0.5)
    state, _ = step(state, regression_batch())

    def eval_fn(params, batch):
        out = batch["x"] @ params["w"]
        assert out.dtype == (jnp.float32 if autocast else jnp.float16)
        return {"out": out, "label": batch["label"]}

    batch = regression_batch(seed=1)
    for use_ema, params in ((False, state.params), (True, state.ema_params)):
        outputs = make_eval_step(eval_fn, use_ema=use_ema)(state, batch)
        assert outputs["out"].dtype == jnp.float32
        assert_same_bits(outputs["label"], batch["label"])
        np.testing.assert_allclose(outputs["out"], batch["x"] @ params["w"], atol=1e-2)
    rules = mpjax.PolicyRules([("batch/x", "float32")], default="mixed_float16")
    outputs = make_eval_step(lambda p, b: (b["x"], p["w"]), policy=rules)(state, batch)
    assert_same_bits(outputs[0], batch["x"])
    plain = mpjax.TrainState.create(params=PARAMS, tx=tx)
    with pytest.raises(ValueError, match="ema=True"):
        make_eval_step(eval_fn, use_ema=True)(plain, batch)


def test_eval_step_with_model_state():
    tx = mpjax.with_loss_scale(optax.sgd(0.5))
    state = mpjax.TrainState.create(params=PARAMS, tx=tx, model_state=jnp.full(1, 2.0))
    out = mpjax.make_eval_step(lambda p, s, b: p["w"][0] * s + b)(state, jnp.ones(1))
    assert float(out[0]) == -1


@pytest.mark.parametrize(
    ("loss_fn", "aux_name"),
    [(lambda p, b, k: (p["b"], 3), "aux"), (linear_loss, "mae")],
)
def test_aux_is_reported(loss_fn, aux_name):
    tx = mpjax.with_loss_scale(optax.sgd(0.5))
    state = mpjax.TrainState.create(params=PARAMS, tx=tx)
    _, metrics = mpjax.make_train_step(loss_fn, tx)(state, regression_batch())
    assert aux_name in metrics


def test_integer_parameters_and_half_losses():
    params = {"w": jnp.ones(4), "table": jnp.array([3, 2049])}
    tx = mpjax.with_loss_scale(optax.adamw(0.1, weight_decay=0.1))
    state = mpjax.TrainState.create(params=params, tx=tx)

    def loss_fn(params, batch, key):
        assert params["table"].dtype == jnp.int32
        return jnp.mean(params["w"] * params["table"][0] * batch["x"]), None

    for k in (1, 2):
        step = mpjax.make_train_step(loss_fn, tx, num_microbatches=k)
        state, metrics = step(state, regression_batch())
        assert metrics["loss"].dtype == jnp.float32
        assert bool(metrics["grads_finite"])
        assert state.params["table"].tolist() == [3, 2049]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_microbatches": 0}, "num_microbatches=0"),
        ({"ema_decay": 1.5}, r"ema_decay=1\.5"),
        ({"policy": "mixed"}, "unknown policy"),
    ],
)
def test_settings_out_of_range(change, message):
    tx = mpjax.with_loss_scale(optax.sgd(0.5))
    with pytest.raises(ValueError, match=message):
        mpjax.make_train_step(linear_loss, tx, **change)


def test_errors_at_the_first_call_say_what_to_do():
    tx = mpjax.with_loss_scale(optax.sgd(0.5))
    state = mpjax.TrainState.create(params=PARAMS, tx=tx)
    batch = regression_batch()

    def fails(match, loss_fn=linear_loss, **kwargs):
        with pytest.raises(ValueError, match=match):
            mpjax.make_train_step(loss_fn, tx, **kwargs)(state, batch)

    fails("ema=True", ema_decay=0.9)
    fails(r"batch\['label'\].*num_microbatches=5", num_microbatches=5)
    fails("take its mean", lambda p, b, k: (b["x"] @ p["w"], None))
    fails(
        "names of the step's own metrics: loss", lambda p, b, k: (p["b"], {"loss": 1})
    )
    with pytest.raises(ValueError, match="wrap the optimizer"):
        mpjax.TrainState.create(params=PARAMS, tx=optax.sgd(0.5))
    with pytest.raises(TypeError, match="wrap_key_data"):
        mpjax.TrainState.create(params=PARAMS, tx=tx, key=jax.random.PRNGKey(0))
    with_ema = mpjax.TrainState.create(params=PARAMS, tx=tx, ema=True)
    with pytest.raises(ValueError, match="an average"):
        mpjax.make_train_step(linear_loss, tx)(with_ema, batch)


def test_a_state_is_replaced_field_by_field():
    tx = mpjax.with_loss_scale(optax.sgd(0.5))
    state = mpjax.TrainState.create(params=PARAMS, tx=tx)
    params = {"w": np.ones(4), "b": 2}
    new = state.replace(params=params, step=7)
    assert new.params is params
    assert new.step == 7
    assert new.opt_state is state.opt_state
    halve = jax.jit(lambda s: s.replace(params=jax.tree.map(lambda p: p / 2, s.params)))
    assert_same_bits(halve(state).params["w"], PARAMS["w"] / 2)
    with pytest.raises(TypeError, match=r"no field 'parms'.*step, params, opt_state"):
        state.replace(parms=params)


def test_train_state_survives_flax_serialization_and_orbax(tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    state, step = rich_step(donate=False)
    for seed in range(2):
        state, _ = step(state, regression_batch(seed=seed))
    fresh, _ = rich_step()
    restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
    assert_same_bits(restored, state)
    a, _ = step(state, regression_batch(seed=5))
    b, _ = step(restored, regression_batch(seed=5))
    assert_same_bits(a, b)


def mlp_loss(params, batch, key):
    del key
    hidden = jnp.tanh(batch["x"] @ params["w"])
    return jnp.mean((jnp.tanh(hidden @ params["w"]) - batch["label"]) ** 2), None


@pytest.mark.parametrize(
    "policy", ["nothing_saveable", jax.checkpoint_policies.dots_saveable]
)
def test_checkpointing_rematerializes_and_changes_nothing(policy):
    params = {"w": jnp.cos(jnp.arange(64.0)).reshape(8, 8)}
    batch = {"x": jnp.ones((4, 8)), "label": jnp.zeros((4, 8))}
    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    state = mpjax.TrainState.create(params=params, tx=tx)
    num_tanh, updated = [], []
    for given in (None, policy):
        step = mpjax.make_train_step(
            mlp_loss, tx, policy="float32", checkpoint_policy=given, donate=False
        )
        eqns = walk(jax.make_jaxpr(step)(state, batch))
        num_tanh.append(sum(eqn.primitive.name == "tanh" for eqn, _, _ in eqns))
        updated.append(step(state, batch)[0].params["w"])
    assert num_tanh == [2, 4]
    np.testing.assert_allclose(*updated, rtol=1e-6)


def test_an_unknown_checkpoint_policy_is_reported():
    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"is none of .*dots_saveable"):
        mpjax.make_train_step(mlp_loss, tx, checkpoint_policy="dots")


SERIALIZE = """
import sys

if sys.argv[1] == "flax first":
    import flax.serialization
import jax
import jax.numpy as jnp
import mpjax
import optax

tx = mpjax.with_loss_scale(optax.adamw(0.1), mpjax.DynamicLossScale(2.0**7))


def create():
    params = {"base": jnp.ones(3), "head": jnp.full(2, 3.0)}
    return mpjax.TrainState.create(
        params=params, tx=tx, ema=True, key=jax.random.key(3), trainable="head",
        model_state={"mean": jnp.zeros(2)},
    )


if sys.argv[1] == "shapes alone":
    state = jax.eval_shape(create)
else:
    state = create()
import flax.serialization

path = sys.argv[2]
if sys.argv[3] == "write":
    data = flax.serialization.to_bytes(state.replace(step=jnp.int32(5)))
    open(path, "wb").write(data)
else:
    restored = flax.serialization.from_bytes(state, open(path, "rb").read())
    right = create().replace(step=jnp.int32(5))
    assert jax.tree.structure(restored) == jax.tree.structure(right)
    same = lambda a, b: a.dtype == b.dtype and (jnp.asarray(a) == jnp.asarray(b)).all()
    assert all(jax.tree.leaves(jax.tree.map(same, restored, right)))
"""


@pytest.mark.slow
def test_serialization_whichever_is_imported_first(tmp_path):
    """In processes of their own, one of which has built no state before it restores."""
    for order, action in (
        ("mpjax first", "write"),
        ("flax first", "read"),
        ("shapes alone", "read"),
    ):
        command = (sys.executable, "-c", SERIALIZE, order, tmp_path / "state", action)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_batch_without_examples_is_refused():
    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    state = mpjax.TrainState.create(params={"w": jnp.ones(8)}, tx=tx)
    step = mpjax.make_train_step(lambda p, b, key: (b["x"] @ p["w"]).mean(), tx)
    with pytest.raises(ValueError, match=r"batch\['x'\] has shape \(0, 8\)"):
        step(state, {"x": jnp.ones((0, 8))})
