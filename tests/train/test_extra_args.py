"""Optimizers that ask for the loss, its gradient or the loss as a function."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import thinned
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax import sharding

OPTIMIZERS = {
    "plateau": lambda: optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    ),
    "polyak": optax.polyak_sgd,
    "lbfgs": optax.lbfgs,
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(12)
    ),
}
X = jax.random.normal(jax.random.key(0), (16, 4))
LABEL = X @ jnp.array([1.0, -2.0, 0.5, 3.0])


def squared_error(w):
    return jnp.mean((X @ w - LABEL) ** 2) + 0.01 * jnp.sum(w**2)


def loss_fn(params, batch, key):
    error = batch["x"] @ params["w"] - batch["label"]
    return jnp.mean(error**2) + 0.01 * jnp.sum(params["w"] ** 2)


def run(make_tx, num=6, policy="float32", axis_name=None, scale=2.0**10, **options):
    tx = mpjax.with_loss_scale(make_tx(), mpjax.DynamicLossScale(scale))
    state = mpjax.TrainState.create(params={"w": jnp.zeros(4)}, tx=tx)
    step = mpjax.make_train_step(loss_fn, tx, policy=policy, donate=False, **options)
    losses = []
    for _ in range(num):
        state, metrics = step(state, {"x": X, "label": LABEL})
        assert bool(metrics["grads_finite"])
        losses.append(float(metrics["loss"]))
    return state, losses


def by_hand(make_tx, num=6):
    """The same optimizer in a loop without mpjax."""
    tx = optax.with_extra_args_support(make_tx())
    w, losses = jnp.zeros(4), []
    opt_state = tx.init(w)
    for _ in range(num):
        value, grad = jax.value_and_grad(squared_error)(w)
        updates, opt_state = tx.update(
            grad, opt_state, w, value=value, grad=grad, value_fn=squared_error
        )
        w = optax.apply_updates(w, updates)
        losses.append(float(value))
    return w, losses


@pytest.mark.parametrize("name", thinned(OPTIMIZERS))
@pytest.mark.parametrize(
    ("num_microbatches", "autocast"),
    [
        (2, True),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(1, False, marks=pytest.mark.weekly),
        pytest.param(2, False, marks=pytest.mark.weekly),
    ],
)
def test_trajectories_are_those_without_scaling(name, num_microbatches, autocast):
    state, losses = run(
        OPTIMIZERS[name], num_microbatches=num_microbatches, autocast=autocast
    )
    w, right = by_hand(OPTIMIZERS[name])
    np.testing.assert_allclose(losses, right, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-3, atol=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "policy",
    [
        pytest.param("mixed_float16", marks=pytest.mark.slow),
        pytest.param("mixed_bfloat16", marks=pytest.mark.weekly),
    ],
)
def test_half_precision(name, policy):
    _, losses = run(OPTIMIZERS[name], policy=policy)
    _, right = by_hand(OPTIMIZERS[name])
    np.testing.assert_allclose(losses, right, rtol=0.1, atol=0.05)


def test_what_stands_after_the_loss_scale_gets_them_too():
    tx = optax.chain(
        mpjax.with_loss_scale(optax.sgd(1.0)),
        optax.scale_by_backtracking_linesearch(12),
        optax.contrib.reduce_on_plateau(),
    )
    state = mpjax.TrainState.create(params={"w": jnp.zeros(4)}, tx=tx)
    step = mpjax.make_train_step(loss_fn, tx, policy="float32")
    for _ in range(6):
        state, metrics = step(state, {"x": X, "label": LABEL})
    _, right = by_hand(OPTIMIZERS["backtracking"])
    np.testing.assert_allclose(metrics["loss"], right[-1], rtol=1e-3)


def test_the_gradient_of_value_fn_does_not_underflow():
    """A loss whose gradients vanish in float16, unless they are scaled."""
    names = ("gradient of value_fn", "grad", "value_fn", "value")

    def init(params):
        zeros = (jnp.zeros_like(params),) * 2 + (jnp.zeros(()),) * 2
        return dict(zip(names, zeros, strict=True))

    def ask(updates, state, params=None, *, value_fn, grad, value, **extra_args):
        loss, gradient = jax.value_and_grad(value_fn)(params)
        return updates, dict(zip(names, (gradient, grad, loss, value), strict=True))

    def tiny_loss(params, batch, key):
        return jnp.sum((batch @ params)[0]) * 2.0**-20

    asking = optax.GradientTransformationExtraArgs(init, ask)
    tx = mpjax.with_loss_scale(asking, mpjax.StaticLossScale(2.0**15))
    state = mpjax.TrainState.create(params=jnp.ones((4, 2)), tx=tx)
    step = mpjax.make_train_step(tiny_loss, tx, policy="mixed_float16")
    state, _ = step(state, jnp.full((3, 4), 2.0**-8))
    gradient, grad, loss, value = state.opt_state.inner_state.values()
    assert np.all(np.asarray(gradient) == 2.0**-28)
    assert np.all(np.asarray(grad) == 2.0**-28)
    assert float(loss) == float(value) == 8 * 2.0**-28


@pytest.mark.slow
def test_a_loop_by_hand_hands_out_unscaled_gradients():
    """Whatever `grad` was: the scaled gradients that `update` takes, or true ones."""
    tx = mpjax.with_loss_scale(optax.lbfgs(), mpjax.StaticLossScale(2.0**10))
    w, state = jnp.zeros(4), tx.init(jnp.zeros(4))
    for _ in range(6):

        def scaled_loss(w, opt_state=state):
            loss = squared_error(w)
            return mpjax.scale_loss(loss, opt_state), loss

        grad, value = jax.grad(scaled_loss, has_aux=True)(w)
        updates, state = tx.update(
            grad, state, w, value=value, grad=grad, value_fn=squared_error
        )
        w = optax.apply_updates(w, updates)
    right, _ = by_hand(optax.lbfgs)
    np.testing.assert_allclose(w, right, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("name", thinned([*OPTIMIZERS], rest="weekly"))
def test_inside_shard_map(name):
    mesh = sharding.auto_mesh(jax.make_mesh((8,), ("data",)))
    tx = mpjax.with_loss_scale(OPTIMIZERS[name](), axis_name="data")
    state = mpjax.TrainState.create(params={"w": jnp.zeros(4)}, tx=tx)
    step = mpjax.make_train_step(
        loss_fn, tx, policy="float32", axis_name="data", donate=False
    )
    mapped = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
        )
    )
    losses = []
    for _ in range(6):
        state, metrics = mapped(state, {"x": X, "label": LABEL})
        losses.append(float(metrics["loss"]))
    _, right = by_hand(OPTIMIZERS[name])
    np.testing.assert_allclose(losses, right, rtol=1e-3, atol=1e-5)
