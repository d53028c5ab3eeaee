"""The update: one decision whether a step is taken, whatever wraps the optimizer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import assert_same_bits, everything

import mpjax
from mpjax._jaxpr.core import walk
from mpjax._xla_cpu import switch


def drop_extra_args(tx):
    """Wraps an optimizer without passing extra arguments on, like `optax.lookahead`."""
    return optax.GradientTransformation(
        tx.init, lambda grads, state, params=None: tx.update(grads, state, params)
    )


SCALED = functools.partial(mpjax.with_loss_scale, optax.adam(0.1))
WRAPPED = {
    "with_loss_scale": SCALED,
    "chain": lambda: optax.chain(SCALED(), optax.add_decayed_weights(0.5)),
    "masked": lambda: optax.masked(SCALED(), True),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda learning_rate: mpjax.with_loss_scale(optax.adam(learning_rate))
    )(learning_rate=0.1),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_step_is_decided_once_and_each_array_selected_once(name, monkeypatch):
    # XLA:CPU's hint is a selection too, by a predicate that is always true.
    monkeypatch.setattr(switch, "is_on", False)
    tx = WRAPPED[name]()
    params, model_state, shape = jnp.ones((7, 5)), jnp.zeros((7, 5)), (7, 5)
    state = mpjax.TrainState.create(
        params=params, tx=tx, model_state=model_state, ema=True
    )

    def loss_fn(params, model_state, batch, key):
        return jnp.sum(params * batch), (model_state + batch, None)

    step = mpjax.make_train_step(
        loss_fn, tx, policy="float32", ema_decay=0.9, donate=False
    )
    batch = jnp.full(shape, 1e-3)
    eqns = [eqn for eqn, _, _ in walk(jax.make_jaxpr(step)(state, batch))]
    selected = [
        eqn
        for eqn in eqns
        if eqn.primitive.name == "select_n" and eqn.outvars[0].aval.shape == shape
    ]
    arrays = [x for x in jax.tree.leaves(state) if x.shape == shape]
    assert len(selected) == len(arrays) == 5  # params, EMA, model state, two moments
    # One check of the norm, and two for the model state: the new and the old.
    checked = [e.invars[0].aval.shape for e in eqns if e.primitive.name == "is_finite"]
    assert sorted(checked) == [(), shape, shape]
    constants = [x for e in eqns for x in e.invars if hasattr(x, "val")]
    assert not any(np.isnan(x.val) for x in constants if np.ndim(x.val) == 0)

    for bad in (np.nan, np.inf):
        after, metrics = step(state, batch.at[1, 2].set(bad))
        assert not metrics["grads_finite"]
        assert_same_bits(everything(after), everything(state))
        scaling = mpjax.loss_scale_state(after.opt_state)
        assert type(scaling) is mpjax.LossScaleState
        assert float(scaling.loss_scale.loss_scale) == 2.0**14
        assert int(scaling.num_skipped) == 1
    after, metrics = step(state, batch)
    assert metrics["grads_finite"]
    assert int(after.step) == 1


def test_a_wrapper_that_drops_the_decision():
    """It is served where the gradients decide, and refused where a model state may."""
    tx = drop_extra_args(SCALED())
    state = mpjax.TrainState.create(params=jnp.ones(3), tx=tx)
    loss_fn = lambda params, batch, key: jnp.sum(params * batch)
    step = mpjax.make_train_step(
        lambda p, b, k: (loss_fn(p, b, k), None), tx, policy="float32", donate=False
    )
    after, metrics = step(state, jnp.array([1.0, jnp.inf, 1.0]))
    assert not metrics["grads_finite"]
    assert int(metrics["num_skipped"]) == 1
    assert_same_bits(everything(after), everything(state))
    after, metrics = step(state, jnp.ones(3))
    assert metrics["grads_finite"]

    state = mpjax.TrainState.create(params=jnp.ones(3), tx=tx, model_state=jnp.ones(2))
    step = mpjax.make_train_step(
        lambda p, s, b, k: (loss_fn(p, b, k), (s, None)), tx, policy="float32"
    )
    with pytest.raises(ValueError, match=r"does not pass .* with_loss_scale\(wrapper"):
        step(state, jnp.ones(3))


class WrapperState(NamedTuple):
    """State of a wrapper of the test's own."""

    inner_state: Any


def test_the_wrapper_that_drops_the_decision_is_named():
    base = SCALED()
    tx = optax.GradientTransformation(
        lambda params: WrapperState(base.init(params)),
        lambda grads, state, params=None: (grads, state),
    )
    state = mpjax.TrainState.create(params=jnp.ones(3), tx=tx, model_state=jnp.ones(2))
    step = mpjax.make_train_step(
        lambda p, s, b, k: (jnp.sum(p * b), (s, None)), tx, policy="float32"
    )
    with pytest.raises(ValueError, match="optimizer whose state is WrapperState"):
        step(state, jnp.ones(3))


def veto(tx):
    """Wraps an optimizer so that every step is skipped."""

    def update(grads, state, params=None, **_):
        return tx.update(grads, state, params, grads_finite=False)

    return optax.GradientTransformationExtraArgs(tx.init, update)


SCALES = lambda: mpjax.with_loss_scale(optax.sgd(0.1))


def test_a_skip_inside_with_loss_scale_skips_the_whole_step():
    tx = veto(SCALES())
    params = {"used": jnp.ones(3), "unused": jnp.ones(2)}
    state = mpjax.TrainState.create(params=params, tx=tx, ema=True)
    loss_fn = lambda p, b, k: (jnp.sum(p["used"] * b), None)
    step = mpjax.make_train_step(
        loss_fn, tx, policy="float32", ema_decay=0.9, donate=False
    )
    after, metrics = step(state, jnp.ones(3))
    assert not metrics["grads_finite"]
    assert int(metrics["num_skipped"]) == 1
    assert_same_bits(everything(after), everything(state))


def in_a_cond(tx):
    """Wraps an optimizer so that it updates in a branch, of operands of its own."""

    def update(grads, state, params=None, **extra):
        run = lambda grads: tx.update(grads, state, params, **extra)
        return jax.lax.cond(params[0][0] > -9, run, run, grads)

    return optax.GradientTransformationExtraArgs(tx.init, update)


CHANGED = {
    "clipping": optax.chain(optax.clip_by_global_norm(1.0), SCALES()),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), SCALES()),
    "decay": optax.chain(optax.add_decayed_weights(0.1), SCALES()),
    "deep inside": optax.chain(
        optax.masked(optax.chain(optax.scale(2.0), SCALES()), True), optax.scale(1.0)
    ),
}
UNCHANGED = {
    "identity": optax.chain(optax.identity(), SCALES()),
    "decay after it": optax.chain(SCALES(), optax.add_decayed_weights(0.1)),
    "master weights around": mpjax.with_master_weights(SCALES()),
    "a part of the parameters": optax.masked(SCALES(), [True, False]),
    "a jit": optax.GradientTransformationExtraArgs(
        SCALES().init, jax.jit(SCALES().update)
    ),
    "a cond": in_a_cond(SCALES()),
}


def take_a_step(tx):
    state = mpjax.TrainState.create(params=[jnp.ones(3), jnp.ones(2)], tx=tx)
    step = mpjax.make_train_step(lambda p, b, k: jnp.sum(p[0] * b), tx)
    return step(state, jnp.ones(3))


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_scaled_gradients_is_refused(name):
    with pytest.raises(ValueError, match=r"put it inside: with_loss_scale\(optax"):
        take_a_step(CHANGED[name])


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_leaves_them_as_they_are_is_not(name):
    _, metrics = take_a_step(UNCHANGED[name])
    assert metrics["grads_finite"]


def test_a_wrapper_may_reset_the_optimizer_in_a_branch():
    """The state has the same type everywhere, so a branch may return a new one."""
    base = SCALED()

    def update(grads, state, params=None, **extra):
        updates, new = base.update(grads, state, params, **extra)
        reset = lambda: base.init(params)
        return updates, jax.lax.cond(params[0] > 5, reset, lambda: new)

    tx = optax.GradientTransformationExtraArgs(base.init, update)
    state = mpjax.TrainState.create(params=jnp.ones(3), tx=tx)
    step = mpjax.make_train_step(lambda p, b, k: (jnp.sum(p * b), None), tx)
    state, metrics = step(state, jnp.ones(3))
    assert metrics["grads_finite"]
    assert type(state.opt_state) is mpjax.LossScaleState
