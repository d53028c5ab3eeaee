"""Half-precision parameters: master weights, and stochastic rounding without them."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import assert_same_bits, rich_optimizer, thinned
from hypothesis import given

import mpjax

HALVES = ["float16", "bfloat16"]


def half_params(dtype):
    return {
        "w": jnp.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4),
        "norm": jnp.ones(4),
    }


def grads_like(params, step):
    return jax.tree.map(
        lambda p: jnp.cos(p.astype(jnp.float32) * (step + 1)).astype(p.dtype), params
    )


@pytest.mark.parametrize("dtype", thinned(HALVES))
def test_the_master_copy_is_the_float32_run(dtype):
    """Half weights follow, rounded, what float32 weights do on the same gradients."""
    params = half_params(dtype)
    tx = mpjax.with_master_weights(rich_optimizer())
    state = tx.init(params)
    plain = rich_optimizer()
    full = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    plain_state = plain.init(full)
    for step in range(20):
        grads = grads_like(params, step)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        updates, plain_state = plain.update(grads, plain_state, full)
        full = optax.apply_updates(full, updates)
    assert state.master["norm"] is None
    assert_same_bits(state.master["w"], full["w"])
    assert_same_bits(params["w"], full["w"].astype(dtype))
    assert_same_bits(params["norm"], full["norm"])
    assert_same_bits(state.inner_state, plain_state)


@pytest.mark.parametrize("dtype", thinned(HALVES))
def test_small_updates_add_up_in_a_master_copy_only(dtype):
    """The paper's |w| / |dw| >= 2048: 10,000 updates of 1e-4 onto 1."""
    tx = mpjax.with_master_weights(optax.sgd(1.0))
    params = jnp.ones(3, dtype)

    def step(carry, _):
        params, state, nearest = carry
        updates, state = tx.update(jnp.full(3, -1e-4), state, params)
        nearest = optax.apply_updates(nearest, jnp.full(3, 1e-4))
        return (optax.apply_updates(params, updates), state, nearest), None

    carry = (params, tx.init(params), params)
    (params, state, nearest), _ = jax.lax.scan(step, carry, length=10_000)
    assert nearest.tolist() == [1.0] * 3
    np.testing.assert_allclose(state.master, 2.0, rtol=1e-3)
    np.testing.assert_allclose(params.astype(jnp.float32), 2.0, rtol=1e-2)


def test_stochastic_rounding_arrives_where_nearest_stays():
    """10,000 updates of 1e-4 onto 1.0 in bfloat16, whose spacing there is 2**-7."""
    tx = mpjax.with_stochastic_rounding(optax.sgd(1.0))
    params = jnp.ones(64, jnp.bfloat16)

    def step(carry, _):
        params, state, nearest = carry
        updates, state = tx.update(jnp.full(64, -1e-4), state, params)
        nearest = optax.apply_updates(nearest, jnp.full(64, 1e-4))
        return (optax.apply_updates(params, updates), state, nearest), None

    carry = (params, tx.init(params), params)
    (params, state, nearest), _ = jax.lax.scan(step, carry, length=10_000)
    assert params.dtype == jnp.bfloat16
    assert int(state.num_updates) == 10_000
    assert nearest.astype(float).tolist() == [1.0] * 64
    mean = params.astype(jnp.float32).mean()
    np.testing.assert_allclose(mean, 2.0, rtol=0.01)


@pytest.mark.parametrize("dtype", [*HALVES, "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("value", thinned([1.003, -1.003, 3e-5, -2.71828, 1e-8, 200.3]))
def test_the_mean_of_many_roundings_is_unbiased(dtype, value):
    """Each of both neighbours comes with the probability that makes the mean exact."""
    num = 200_000
    value = float(np.float32(value))
    low, high = neighbours(value, dtype)
    x = jnp.full(num, value, jnp.float32)
    rounded = mpjax.stochastic_round(x, dtype, jax.random.key(3))
    values, counts = np.unique(np.asarray(rounded, np.float64), return_counts=True)
    assert set(values) <= {low, high}
    share_up = (value - low) / (high - low)
    mean = float(values @ counts) / num
    standard_error = (high - low) * np.sqrt(share_up * (1 - share_up) / num)
    assert abs(mean - value) <= 3 * standard_error


def neighbours(value, dtype):
    """Returns the neighbours of a value in a format, out of all its bit patterns."""
    dtype = jnp.dtype(dtype)
    bits = np.arange(2 ** (8 * dtype.itemsize), dtype=f"uint{8 * dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # NaN patterns
        numbers = bits.view(dtype).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    index = np.searchsorted(numbers, value)
    return numbers[index - 1], numbers[index]


@given(
    hnp.arrays(np.float32, 40, elements=st.floats(-1e5, 1e5, width=32)),
    st.sampled_from(HALVES),
    st.integers(0, 2**31),
)
def test_rounding_goes_to_a_neighbour_and_keeps_what_half_holds(x, dtype, seed):
    x = jnp.asarray(x)
    key = jax.random.key(seed)
    rounded = mpjax.stochastic_round(x, dtype, key)
    nearest = x.astype(dtype)
    inf = jnp.asarray(jnp.inf, dtype)
    up, down = jnp.nextafter(nearest, inf), jnp.nextafter(nearest, -inf)
    assert bool(jnp.all((rounded == nearest) | (rounded == up) | (rounded == down)))
    exact = nearest.astype(jnp.float32)
    exact = jnp.where(jnp.isfinite(exact), exact, 0)
    assert_same_bits(mpjax.stochastic_round(exact, dtype, key), exact.astype(dtype))


def test_values_beyond_the_format_round_as_to_nearest():
    x = jnp.array([65504.0, 65519.0, 65520.0, jnp.inf, -jnp.inf])
    for seed in range(20):
        rounded = mpjax.stochastic_round(x, jnp.float16, jax.random.key(seed))
        assert_same_bits(rounded, x.astype(jnp.float16))
    nan = mpjax.stochastic_round(jnp.array([jnp.nan]), jnp.float16, jax.random.key(0))
    assert bool(jnp.isnan(nan[0]))


@pytest.mark.parametrize(
    "wrap", [mpjax.with_master_weights, mpjax.with_stochastic_rounding]
)
@pytest.mark.parametrize("order", ["inside", "outside"])
def test_with_loss_scaling(wrap, order):
    """Scaled half gradients with an overflow: nothing moves, then training goes on."""
    params = half_params("float16")
    if order == "inside":
        tx = mpjax.with_loss_scale(wrap(rich_optimizer()))
    else:
        tx = wrap(mpjax.with_loss_scale(rich_optimizer()))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(3):
        scale = mpjax.loss_scale_state(state).loss_scale
        grads = jax.tree.map(
            lambda g, s=scale: s.scale(1e-3 * g).astype(g.dtype),
            grads_like(params, step),
        )
        updates, state = update(grads, state, params)
        moved = optax.apply_updates(params, updates)
        assert bool(mpjax.loss_scale_state(state).grads_finite)
        bad = {**grads, "w": grads["w"] * jnp.inf}
        updates, after = update(bad, state, moved)
        assert_same_bits(optax.apply_updates(moved, updates), moved)
        if order == "inside":
            assert_same_bits(after.inner_state, state.inner_state)
        assert int(mpjax.loss_scale_state(after).num_skipped) == step + 1
        assert not np.array_equal(moved["w"], params["w"])
        assert moved["w"].dtype == jnp.float16
        params, state = moved, after


@pytest.mark.parametrize(
    "wrap", [mpjax.with_master_weights, mpjax.with_stochastic_rounding]
)
def test_inner_moments_are_float32_and_params_are_required(wrap):
    tx = wrap(optax.adam(0.1))
    params = half_params("bfloat16")
    state = tx.init(params)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    with pytest.raises(ValueError, match="needs them"):
        tx.update(grads_like(params, 0), state)


def test_the_same_seed_gives_the_same_rounding():
    def run(seed):
        tx = mpjax.with_stochastic_rounding(optax.sgd(1e-3), seed=seed)
        params, state = jnp.ones(256, jnp.bfloat16), None
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jnp.ones(256), state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params.astype(jnp.float32))

    assert np.array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))


def keep_gradients():
    """An optimizer that moves nothing, and whose state is the last gradients."""
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    return optax.GradientTransformation(
        zeros, lambda grads, state, params=None: (zeros(grads), grads)
    )


@pytest.mark.filterwarnings("ignore:.*updates much smaller:UserWarning")
@pytest.mark.parametrize("num_microbatches", thinned([1, 2]))
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("policy", ["float32", "p=bf16,c=f32,o=f32"])
def test_gradients_of_half_parameters_are_float32(policy, autocast, num_microbatches):
    """Under a policy that computes in float32, they are not rounded to half."""
    keys = jax.random.split(jax.random.key(0), 2)
    w = jax.random.normal(keys[0], (8, 4)).astype(jnp.bfloat16)
    x = jax.random.normal(keys[1], (16, 8))
    tx = mpjax.with_loss_scale(keep_gradients())
    state = mpjax.TrainState.create(params={"w": w}, tx=tx)
    step = mpjax.make_train_step(
        lambda params, batch, key: jnp.mean((batch @ params["w"]) ** 2),
        tx,
        policy=policy,
        autocast=autocast,
        num_microbatches=num_microbatches,
    )
    state, _ = step(state, x)
    found = state.opt_state.inner_state["w"]
    wide_x, wide_w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    right = 2 * wide_x.T @ (wide_x @ wide_w) / (16 * 4)
    assert found.dtype == jnp.float32
    assert state.params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_barrier_keeps_the_cast_that_a_gpu_would_leave_out(dtype):
    """tests/experiments/test_updates.py looks at the text compiled for an H100."""
    fn = lambda x, key: mpjax.half_weights.stochastic_round(x, jnp.dtype(dtype), key)
    body = jax.make_jaxpr(fn)(jnp.ones(8), jax.random.key(0)).jaxpr
    x = body.invars[0]
    (cast,) = (
        eqn
        for eqn in body.eqns
        if eqn.primitive.name == "convert_element_type" and eqn.invars == [x]
    )
    (reader,) = (eqn for eqn in body.eqns if cast.outvars[0] in eqn.invars)
    assert reader.primitive.name == "optimization_barrier"
