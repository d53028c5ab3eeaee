"""Updates rounded to float16, and what is counted of them in the train step."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import assert_same_bits, rich_optimizer

import mpjax
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.float16_updates import round_to_float16, with_float16_updates
from experiments.harness.update_tracking import (
    Counts,
    _add,
    _totals,
    histogram_from_json,
    read_tracked,
    share_below,
    track_updates,
    tracked,
)


def float16_numbers():
    """Returns all finite float16 numbers, as float64."""
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    return np.unique(numbers[np.isfinite(numbers)])


def as_numpy_casts(x):
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16)


def test_rounding_is_that_of_a_cast():
    """All float16 numbers, the ties between them, and what is beside the ties."""
    numbers = float16_numbers()
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, ties]).astype(np.float32)
    beside = [np.nextafter(x, np.float32(end)) for end in (-np.inf, np.inf)]
    more = [65519.99, 65520, 1e9, np.inf, -np.inf, 1e-30]
    x = np.concatenate([x, *beside, np.array(more, np.float32)])
    rounded = jax.jit(round_to_float16)(x)
    assert_same_bits(rounded, as_numpy_casts(x).astype(np.float32))
    assert bool(jnp.isnan(round_to_float16(jnp.float32(np.nan))))


def float16_step(updates, params):
    """Applies the updates as the train step does."""
    tx = with_float16_updates(optax.identity())
    updates, _ = tx.update(updates, tx.init(params), params)
    return (params + updates).astype(params.dtype)


def test_the_sum_is_that_of_float16_arithmetic():
    rng = np.random.default_rng(0)
    exponents = rng.integers(-24, 12, (2, 100_000)).astype(np.float32)
    weights, updates = np.ldexp(rng.uniform(-2, 2, (2, 100_000)), exponents.astype(int))
    weights = as_numpy_casts(weights)
    updates = (updates / 64).astype(np.float32)
    expected = weights + as_numpy_casts(updates)
    assert expected.dtype == np.float16
    assert_same_bits(jax.jit(float16_step)(updates, weights), expected)
    lost = expected == weights
    assert 0.2 < lost.mean() < 0.8


def test_a_small_update_vanishes_though_the_weight_would_keep_it():
    weights = jnp.full(3, 2.0**-24, jnp.float16)
    updates = jnp.array([2.0**-26, 2.0**-25 * 1.01, 2.0**-24])
    moved = jax.jit(float16_step)(updates, weights) - weights
    assert (moved.astype(jnp.float32) * 2**24).tolist() == [0, 1, 1]
    weights = jnp.ones(3, jnp.float16)
    updates = jnp.array([2.0**-12, -(2.0**-13), 2.0**-10])
    moved = jax.jit(float16_step)(updates, weights) - weights
    assert moved.tolist() == [0, 0, 2.0**-10]


def test_no_compiler_pass_takes_the_rounding_away():
    args = jnp.ones(8), jnp.ones(8, jnp.float16)
    lowered = jax.jit(float16_step).lower(*args)
    assert len(re.findall(r"stablehlo.reduce_precision.*e5m10", lowered.as_text())) == 1
    assert "stablehlo.round_nearest_even" in lowered.as_text()
    compiled = lowered.compile().as_text()
    assert "exponent_bits=5, mantissa_bits=10" in compiled
    assert "round-nearest-even" in compiled


@pytest.mark.h100
def test_no_compiler_pass_for_a_gpu_takes_the_rounding_away():
    script = Path(__file__).parents[1] / "helpers" / "h100_rounding.py"
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    texts = json.loads(done.stdout.splitlines()[-1])["rows"]
    update = texts["float16_update"]
    assert "exponent_bits=5, mantissa_bits=10" in update
    assert "round-nearest-even" in update
    # Casts in place of these: to float32 and back, of the weight alone.
    assert len(re.findall(r" convert\(", texts["cast_update"])) == 2
    # x - nearest, where nearest comes out of another kernel in float16.
    assert re.search(r"fused\w* \(\S+ f16\[256\]", texts["stochastic"])


# Tracking.


def small_params():
    key = jax.random.key(0)
    return {"w": jax.random.normal(key, (5, 4)), "norm": jnp.ones(4)}


def loss_fn(params, batch, key):
    del key
    hidden = jnp.tanh(batch["x"] @ params["w"]) * params["norm"]
    return jnp.mean((hidden.sum(-1) - batch["y"]) ** 2)


def batch(step=0, factor=1.0):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(8, 5)).astype(np.float32)
    return {"x": x, "y": factor * x.sum(-1)}


def train(tx, policy="float32", *, num_steps=5, bad=()):
    step = mpjax.make_train_step(loss_fn, tx, policy=policy)
    state = mpjax.TrainState.create(params=small_params(), tx=tx)
    for index in range(num_steps):
        state, _ = step(state, batch(index, np.inf if index in bad else 1.0))
    return state


def update(tx, *, scale=1.0, dtype=jnp.float32):
    """Returns the optimizer's state after one jitted update, and the parameters."""
    params = jax.tree.map(lambda p: p.astype(dtype), small_params())
    grads = jax.grad(loss_fn)(small_params(), batch(), None)
    tx = mpjax.with_loss_scale(tx, mpjax.StaticLossScale(scale))
    scaled = jax.tree.map(lambda g: g * scale, grads)
    _, state = jax.jit(tx.update)(scaled, tx.init(params), params)
    return state, params


@pytest.mark.parametrize(
    "policy", ["mixed_float16", pytest.param("float32", marks=pytest.mark.weekly)]
)
def test_tracking_changes_no_bit_of_the_training_and_skipped_steps_do_not_count(policy):
    scale = mpjax.DynamicLossScale(2.0**10)
    plain, state = (
        train(mpjax.with_loss_scale(tx, scale), policy, bad=(1, 3))
        for tx in (rich_optimizer(), track_updates(rich_optimizer()))
    )
    assert int(state.opt_state.num_skipped) == 2
    assert_same_bits(state.params, plain.params)
    inner = tracked(state.opt_state).inner_state
    assert_same_bits(inner, plain.opt_state.inner_state)
    values = read_tracked(state.opt_state, state.params)
    assert values["updates"]["w"]["num_nonzero"] == 3 * 20
    histogram = histogram_from_json(values["gradients"])
    assert int(histogram.num_values) == 3 * 24
    assert int(histogram.infs) == int(histogram.nans) == 0


def test_it_sees_unscaled_gradients():
    state, params = update(track_updates(optax.sgd(0.1)), scale=2.0**12)
    histogram = histogram_from_json(read_tracked(state, params)["gradients"])
    grads = jax.grad(loss_fn)(params, batch(), None)
    numbers = np.concatenate([np.asarray(g).ravel() for g in grads.values()])
    exponents = np.frexp(numbers)[1] - 1
    assert histogram.counts.sum() == len(numbers)
    for exponent, count in zip(histogram.exponents, histogram.counts, strict=True):
        assert count == np.sum(exponents == exponent)
    assert 0 < share_below(histogram, 0) == np.mean(exponents < 0) < 1


def test_lost_updates_are_those_that_numpy_loses():
    """Three steps of known gradients, in float16 by NumPy beside."""
    rng = np.random.default_rng(1)
    params = {"a": rng.normal(size=500).astype(np.float16), "b": np.ones(3, np.float16)}
    tx = with_float16_updates(track_updates(optax.sgd(1.0)))
    state = tx.init(params)
    nonzero, zeroed, lost, magnitude = 0, 0, 0, 0.0
    for _ in range(3):
        exponents = rng.integers(-30, -4, 500)
        grads = {"a": np.ldexp(rng.uniform(1, 2, 500), exponents).astype(np.float32)}
        grads["a"][:7] = 0
        grads["b"] = np.full(3, 2.0**-20, np.float32)
        updates, state = jax.jit(tx.update)(grads, state, params)
        half = as_numpy_casts(-grads["a"])
        is_lost = (params["a"] + half == params["a"]) & (grads["a"] != 0)
        nonzero += np.sum(grads["a"] != 0)
        zeroed += np.sum((half == 0) & (grads["a"] != 0))
        lost += np.sum(is_lost)
        magnitude += np.sum(grads["a"][is_lost], dtype=np.float64)
        last = is_lost.sum() / np.sum(grads["a"] != 0)
        params = {k: np.asarray(w + updates[k], np.float16) for k, w in params.items()}
    values = read_tracked(state, params)["updates"]
    a, b = values["a"], values["b"]
    assert (a["num_nonzero"], a["num_zeroed"], a["num_lost"]) == (nonzero, zeroed, lost)
    assert 0 < zeroed < lost < nonzero
    np.testing.assert_allclose(a["lost_magnitude"], magnitude, rtol=1e-5)
    np.testing.assert_allclose(a["last_share"], last, rtol=1e-6)
    assert (b["num_nonzero"], b["num_zeroed"], b["num_lost"]) == (9, 0, 9)
    assert b["magnitude"] == b["lost_magnitude"] == 9 * 2.0**-20
    assert params["b"].tolist() == [1, 1, 1]


@pytest.fixture(scope="module")
def of_nearest():
    tx = with_float16_updates(track_updates(optax.sgd(1e-4)))
    return read_tracked(*update(tx, dtype=jnp.float16))["updates"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap", [mpjax.with_stochastic_rounding, mpjax.with_master_weights]
)
def test_every_kind_of_float16_weights_has_the_same_updates(wrap, of_nearest):
    state, params = update(wrap(track_updates(optax.sgd(1e-4))), dtype=jnp.float16)
    assert read_tracked(state, params)["updates"] == of_nearest
    assert of_nearest["norm"]["num_nonzero"] == 4
    assert 0 < of_nearest["w"]["num_lost"] <= 20


def test_counts_go_beyond_32_bits():
    counts = Counts(jnp.uint32(2**32 - 2), jnp.uint32(1))
    for more in (1, 2, 2**31 - 1):
        counts = _add(counts, jnp.int32(more))
    assert int(_totals(jax.device_get(counts))) == 2**33 - 2 + 3 + 2**31 - 1


def test_a_checkpoint_keeps_the_counts(tmp_path):
    tx = track_updates(optax.adam(0.1))
    state, params = update(tx)
    expected = read_tracked(state, params)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(5, state, {})
    restored = checkpoints.restore(
        mpjax.with_loss_scale(tx, mpjax.StaticLossScale(1.0)).init(params)
    )
    checkpoints.close()
    assert restored is not None
    assert_same_bits(restored.state, state)
    assert read_tracked(restored.state, params) == expected
    assert json.loads(json.dumps(expected)) == expected


def test_what_it_cannot_do_it_says():
    params = {"w": jnp.ones(2)}
    tx = track_updates(optax.sgd(1.0))
    with pytest.raises(ValueError, match="needs them"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="found 0"):
        tracked(optax.sgd(1.0).init(params))
    assert np.isnan(share_below(histogram_from_json(EMPTY), 0))


EMPTY = {
    "class_counts": np.zeros((3, 6), int).tolist(),
    **dict.fromkeys(("zeros", "below", "above", "infs", "nans"), 0),
    "lo": -1,
    "hi": 1,
}
