"""The dynamic loss scale against pure-Python state machines and other libraries."""

import dataclasses
import functools
import os

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given

import mpjax

# One length, so that each setting compiles once.
FINITE_RUNS = st.lists(st.booleans(), min_size=24, max_size=24)
POWERS = st.integers(-3, 20).map(lambda n: 2.0**n)


@dataclasses.dataclass
class Machine:
    """The documented state machine, in Python floats."""

    loss_scale: float
    growth_interval: int
    growth_factor: float
    backoff_factor: float
    hysteresis: int
    min_loss_scale: float
    max_loss_scale: float

    def __post_init__(self):
        self.num_finite_steps = 0
        self.hysteresis_left = self.hysteresis

    def adjust(self, finite):
        if finite:
            self.num_finite_steps += 1
            if self.num_finite_steps == self.growth_interval:
                self.loss_scale = min(
                    self.loss_scale * self.growth_factor, self.max_loss_scale
                )
                self.num_finite_steps = 0
                self.hysteresis_left = self.hysteresis
        else:
            self.num_finite_steps = 0
            self.hysteresis_left = max(self.hysteresis_left - 1, 0)
            if self.hysteresis_left == 0:
                self.loss_scale = max(
                    self.loss_scale * self.backoff_factor, self.min_loss_scale
                )

    def state(self):
        return self.loss_scale, self.num_finite_steps, self.hysteresis_left


@st.composite
def settings(draw):
    low, scale, high = sorted(draw(st.tuples(POWERS, POWERS, POWERS)))
    return {
        "loss_scale": scale,
        "growth_interval": draw(st.integers(1, 7)),
        "growth_factor": draw(st.sampled_from([1.0, 2.0, 4.0, 16.0])),
        "backoff_factor": draw(st.sampled_from([0.5, 0.25, 0.125])),
        "hysteresis": draw(st.integers(1, 4)),
        "min_loss_scale": low,
        "max_loss_scale": high,
    }


def trajectory(loss_scale, finite_steps):
    """Returns all states along a run, from one jitted scan."""

    states = _scan(loss_scale, jnp.asarray(finite_steps))
    return list(zip(*(np.asarray(x).tolist() for x in states), strict=True))


@jax.jit
def _scan(loss_scale, finite_steps):
    def step(scale, finite):
        scale = scale.adjust(finite)
        return scale, (scale.loss_scale, scale.num_finite_steps, scale.hysteresis_left)

    return jax.lax.scan(step, loss_scale, finite_steps)[1]


@given(settings(), FINITE_RUNS)
@example(
    {
        "loss_scale": 2.0**15,
        "growth_interval": 1,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "hysteresis": 1,
        "min_loss_scale": 1.0,
        "max_loss_scale": 2.0**16,
    },
    [True] * 4 + [False] * 20,
)
def test_agrees_with_the_state_machine(settings, finite_steps):
    machine = Machine(**settings)
    expected = []
    for finite in finite_steps:
        machine.adjust(finite)
        expected.append(machine.state())
    assert trajectory(mpjax.DynamicLossScale(**settings), finite_steps) == expected


@given(settings(), FINITE_RUNS)
def test_powers_of_two_stay_powers_of_two(settings, finite_steps):
    for scale, _, _ in trajectory(mpjax.DynamicLossScale(**settings), finite_steps):
        assert np.frexp(scale)[0] == 0.5
        assert settings["min_loss_scale"] <= scale <= settings["max_loss_scale"]


@given(
    st.floats(1.0, 3.0),
    st.floats(0.1, 0.9),
    st.integers(1, 3),
    FINITE_RUNS,
)
def test_odd_factors_agree_to_float32_rounding(growth, backoff, interval, finite_steps):
    settings = {
        "loss_scale": 1000.0,
        "growth_interval": interval,
        "growth_factor": growth,
        "backoff_factor": backoff,
        "hysteresis": 1,
        "min_loss_scale": 0.37,
        "max_loss_scale": 54321.0,
    }
    machine, expected = Machine(**settings), []
    for finite in finite_steps:
        machine.adjust(finite)
        expected.append(machine.loss_scale)
    got = [s[0] for s in trajectory(mpjax.DynamicLossScale(**settings), finite_steps)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@given(FINITE_RUNS, st.integers(1, 5))
def test_agrees_with_optimizer_bookkeeping(finite_steps, interval):
    """with_loss_scale counts skips as the sequence says and follows the same scale."""
    scale = mpjax.DynamicLossScale(2.0**5, growth_interval=interval)
    tx = mpjax.with_loss_scale(optax.sgd(1.0), scale)
    state = tx.init(jnp.zeros(1))
    for finite in finite_steps:
        grads = jnp.full(1, 1.0 if finite else np.nan)
        _, state = tx.update(grads, state)
    in_a_row = 0
    for finite in finite_steps:
        in_a_row = 0 if finite else in_a_row + 1
    assert int(state.num_skipped) == finite_steps.count(False)
    assert int(state.num_consecutive_skipped) == in_a_row
    last = trajectory(scale, finite_steps)[-1]
    assert float(state.loss_scale.loss_scale) == last[0]


# Settings that other libraries share: no limits reached, no hysteresis.
WIDE = {"min_loss_scale": 2.0**-60, "max_loss_scale": 2.0**100}


@given(FINITE_RUNS, st.integers(1, 5))
def test_agrees_with_jmp(finite_steps, interval):
    jmp = pytest.importorskip("jmp")
    theirs = jmp.DynamicLossScale(
        jnp.float32(2.0**10), period=interval, min_loss_scale=jnp.float32(2.0**-60)
    )
    scales = []
    for finite in finite_steps:
        theirs = theirs.adjust(jnp.array(finite))
        scales.append(float(theirs.loss_scale))
    ours = mpjax.DynamicLossScale(2.0**10, growth_interval=interval, **WIDE)
    assert [s[0] for s in trajectory(ours, finite_steps)] == scales


@jax.jit
def _flax_step(scale, x):
    return scale.value_and_grad(lambda p: p * x)(1.0)[0]


@given(FINITE_RUNS, st.integers(1, 5))
def test_agrees_with_flax_whose_interval_is_one_longer(finite_steps, interval):
    dynamic_scale = pytest.importorskip("flax.training.dynamic_scale")
    theirs = dynamic_scale.DynamicScale(growth_interval=interval, scale=2.0**10)

    scales = []
    for finite in finite_steps:
        theirs = _flax_step(theirs, 1.0 if finite else jnp.nan)
        scales.append(float(theirs.scale))
    ours = mpjax.DynamicLossScale(2.0**10, growth_interval=interval + 1, **WIDE)
    assert [s[0] for s in trajectory(ours, finite_steps)] == scales


@functools.cache
def _keras_run(interval):
    """Returns a jitted `finite_steps -> scales` by Keras's stateless interface."""
    keras = pytest.importorskip("keras")
    theirs = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=2.0**10, dynamic_growth_steps=interval
    )
    weight = keras.Variable(np.zeros(1, np.float32))
    theirs.build([weight])
    index = [v.path for v in theirs.variables].index(theirs.dynamic_scale.path)

    def step(carry, finite):
        weights, variables = carry
        grads = [jnp.where(finite, jnp.ones(1), jnp.nan)]
        weights, variables = theirs.stateless_apply(variables, grads, weights)
        return (weights, variables), variables[index]

    start = [weight.value], [v.value for v in theirs.variables]
    return jax.jit(lambda finite_steps: jax.lax.scan(step, start, finite_steps)[1])


@given(FINITE_RUNS, st.integers(1, 5))
def test_agrees_with_keras(finite_steps, interval):
    assert os.environ["KERAS_BACKEND"] == "jax"
    scales = _keras_run(interval)(jnp.asarray(finite_steps)).tolist()
    ours = mpjax.DynamicLossScale(2.0**10, growth_interval=interval, **WIDE)
    assert [s[0] for s in trajectory(ours, finite_steps)] == scales


@given(FINITE_RUNS, st.integers(1, 5), st.sampled_from([2.0, 4.0]))
def test_agrees_with_torch(finite_steps, interval, factor):
    torch = pytest.importorskip("torch")
    scaler = torch.amp.GradScaler(
        "cpu",
        init_scale=2.0**10,
        growth_interval=interval,
        growth_factor=factor,
        backoff_factor=0.25,
    )
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scales = []
    for finite in finite_steps:
        scaler.scale(torch.ones(1))
        weight.grad = torch.full((1,), 1.0 if finite else float("inf"))
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    ours = mpjax.DynamicLossScale(
        2.0**10,
        growth_interval=interval,
        growth_factor=factor,
        backoff_factor=0.25,
        **WIDE,
    )
    assert [s[0] for s in trajectory(ours, finite_steps)] == scales
