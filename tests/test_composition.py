"""with_loss_scale inside and around optax's own wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers.tools import assert_same_bits, thinned

import mpjax

PARAMS = {"a": jnp.linspace(-1, 1, 4), "b": jnp.ones(2)}
LABELS = {"a": "slow", "b": "fast"}
MASK = {"a": True, "b": True}


def multi(wrap):
    return optax.multi_transform(
        {"slow": wrap(optax.sgd(0.1)), "fast": optax.adam(0.2)}, LABELS
    )


# name: (optimizer with the loss scale inside of it, the same without a loss scale)
OUTSIDE = {
    "chain": lambda w: optax.chain(w(optax.adam(0.1)), optax.scale(0.5)),
    "masked": lambda w: optax.masked(w(optax.adam(0.1)), MASK),
    "inject_hyperparams": lambda w: optax.inject_hyperparams(
        lambda learning_rate: w(optax.adam(learning_rate))
    )(learning_rate=0.1),
    "schedule_free": lambda w: optax.contrib.schedule_free(
        w(optax.sgd(0.1)), learning_rate=0.1
    ),
    "nested": lambda w: optax.chain(
        optax.masked(optax.chain(w(optax.adam(0.1))), MASK)
    ),
}
# name: the optimizer that with_loss_scale wraps
INSIDE = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)),
    "masked": lambda: optax.masked(optax.adam(0.1), {"a": True, "b": False}),
    "multi_transform": lambda: multi(lambda tx: tx),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 5)
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.1),
}


def grads_at(step):
    return jax.tree.map(lambda p: jnp.cos(p * (step + 1)), PARAMS)


def train(tx, steps, *, scaled, jit=False):
    """Updates by the gradients of these steps; None stands for an overflow.

    Without jit two programs agree bitwise; inside it XLA may fuse them differently.
    """
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update) if jit else tx.update
    for step in steps:
        grads = grads_at(0 if step is None else step)
        if scaled:
            scale = mpjax.loss_scale_state(state).loss_scale
            grads = scale.scale(grads)
        if step is None:
            grads = {**grads, "b": jnp.array([1.0, jnp.inf])}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_loss_scale_is_found_and_exact_inside(name):
    make = OUTSIDE[name]
    params, state = train(make(mpjax.with_loss_scale), range(4), scaled=True)
    expected, _ = train(make(lambda tx: tx), range(4), scaled=False)
    assert_same_bits(params, expected)
    loss = mpjax.scale_loss(jnp.float32(3), state)
    assert float(loss) == 3 * 2.0**15


@pytest.mark.parametrize(
    "tx",
    [
        optax.MultiSteps(mpjax.with_loss_scale(optax.adam(0.1)), 2),
        optax.apply_if_finite(mpjax.with_loss_scale(optax.adam(0.1)), 3),
        optax.chain(
            optax.apply_if_finite(
                optax.chain(mpjax.with_loss_scale(optax.adam(0.1))), 3
            )
        ),
    ],
    ids=["MultiSteps", "apply_if_finite", "nested"],
)
def test_what_hides_overflows_is_refused_around(tx):
    state = tx.init(PARAMS)
    for refuse in (
        lambda: mpjax.loss_scale_state(state),
        lambda: mpjax.scale_loss(jnp.float32(1), state),
        lambda: mpjax.TrainState.create(params=PARAMS, tx=tx),
    ):
        with pytest.raises(ValueError, match=r"put it inside: with_loss_scale\(optax"):
            refuse()


def test_a_loss_scale_in_a_loss_scale_is_refused():
    inner = optax.chain(optax.clip(1.0), mpjax.with_loss_scale(optax.adam(0.1)))
    with pytest.raises(ValueError, match="unscaled twice"):
        mpjax.with_loss_scale(inner).init(PARAMS)


@pytest.mark.parametrize("name", thinned(INSIDE))
def test_the_loss_scale_is_exact_around(name):
    tx = mpjax.with_loss_scale(INSIDE[name]())
    params, state = train(tx, range(4), scaled=True)
    plain = INSIDE[name]()
    plain = optax.GradientTransformation(plain.init, plain.update)
    expected, expected_state = train(plain, range(4), scaled=False)
    assert_same_bits(params, expected)
    assert_same_bits(state.inner_state, expected_state)
    assert float(mpjax.scale_loss(jnp.float32(3), state)) == 3 * 2.0**15


@pytest.mark.parametrize("name", INSIDE)
def test_overflows_leave_no_trace_inside(name):
    """Training with overflowing steps equals training without them."""
    tx = mpjax.with_loss_scale(INSIDE[name]())
    params, state = train(tx, [0, None, 1, None, None, 2, 3], scaled=True, jit=True)
    expected, expected_state = train(tx, range(4), scaled=True, jit=True)
    assert_same_bits(params, expected)
    assert_same_bits(state.inner_state, expected_state.inner_state)
    assert int(state.num_skipped) == 3
    assert float(state.loss_scale.loss_scale) == 2.0**12


def test_lookahead():
    """Its parameters are a pair, and its updates have the shape of the pair."""
    tx = mpjax.with_loss_scale(optax.lookahead(optax.sgd(0.1), 2, 0.5))
    plain = optax.lookahead(optax.sgd(0.1), 2, 0.5)
    pair = optax.LookaheadParams.init_synced(PARAMS)
    state, plain_state, plain_pair = tx.init(pair), plain.init(pair), pair
    for step in range(4):
        grads = mpjax.loss_scale_state(state).loss_scale.scale(grads_at(step))
        updates, state = tx.update(grads, state, pair)
        pair = optax.apply_updates(pair, updates)
        updates, plain_state = plain.update(grads_at(step), plain_state, plain_pair)
        plain_pair = optax.apply_updates(plain_pair, updates)
    assert_same_bits(pair, plain_pair)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads_at(0))
    updates, after = tx.update(bad, state, pair)
    assert_same_bits(optax.apply_updates(pair, updates), pair)
    assert_same_bits(after.inner_state, state.inner_state)
    outside = optax.lookahead(mpjax.with_loss_scale(optax.sgd(0.1)), 2, 0.5)
    assert float(mpjax.scale_loss(jnp.float32(1), outside.init(pair))) == 2.0**15


def test_multi_transform_has_one_scale_around_it():
    """One loss, one scale: in a part of the parameters it would be the wrong one."""
    tx = multi(mpjax.with_loss_scale)
    assert float(mpjax.scale_loss(jnp.float32(1), tx.init(PARAMS))) == 2.0**15
    both = optax.multi_transform(
        {
            "slow": mpjax.with_loss_scale(optax.sgd(0.1)),
            "fast": mpjax.with_loss_scale(optax.adam(0.2)),
        },
        LABELS,
    )
    with pytest.raises(ValueError, match=r"with_loss_scale\(multi_transform"):
        mpjax.scale_loss(jnp.float32(1), both.init(PARAMS))


def test_extra_arguments_reach_the_optimizer():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda u: u * factor, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = mpjax.with_loss_scale(inner, mpjax.NoOpLossScale())
    updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), factor=3.0)
    assert float(updates[0]) == 3


@pytest.mark.parametrize("solver", ["lbfgs", "reduce_on_plateau"])
def test_optimizers_that_need_the_loss(solver):
    if solver == "lbfgs":
        inner = optax.scale_by_lbfgs(memory_size=3)
    else:
        inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    tx = mpjax.with_loss_scale(inner)
    state = tx.init(PARAMS)
    scaled = state.loss_scale.scale(grads_at(0))
    updates, state = jax.jit(tx.update)(
        scaled, state, PARAMS, value=jnp.float32(1), grad=grads_at(0)
    )
    assert np.isfinite(np.asarray(updates["a"])).all()


def test_a_model_state_with_nan_backs_off():
    tx = mpjax.with_loss_scale(optax.adam(1e-2))

    def loss_fn(params, model_state, batch, key):
        return jnp.sum(params * batch), (model_state * jnp.nan, None)

    state = mpjax.TrainState.create(params=jnp.ones(3), model_state=jnp.ones(2), tx=tx)
    step = mpjax.make_train_step(loss_fn, tx, donate=False)
    after, metrics = step(state, jnp.ones(3))
    assert not metrics["grads_finite"]
    assert int(metrics["num_skipped"]) == 1
    assert float(after.opt_state.loss_scale.loss_scale) == 2.0**14
    assert int(after.step) == 0
    np.testing.assert_array_equal(after.params, state.params)


@pytest.mark.parametrize("finite", [True, False, np.True_, jnp.array(False)])
def test_a_caller_may_have_checked_already(finite):
    tx = mpjax.with_loss_scale(optax.sgd(1.0))
    state = tx.init(jnp.ones(2))
    updates, state = tx.update(jnp.full(2, 2.0**15), state, grads_finite=finite)
    np.testing.assert_array_equal(updates, [-1.0, -1.0] if finite else [0.0, 0.0])
    assert bool(state.grads_finite) == bool(finite)
    assert int(state.num_skipped) == (not finite)
