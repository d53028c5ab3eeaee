"""with_loss_scale: the recipe's order, skipped updates, what is found and refused."""

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from helpers.tools import assert_same_bits, rich_optimizer

import mpjax

PARAMS = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.zeros(3)}
GRADS = jax.tree.map(lambda p: 0.1 * p + 0.01, PARAMS)


def scaled(grads, state, dtype=jnp.float32):
    scale = mpjax.loss_scale_state(state).loss_scale.scale
    return jax.tree.map(lambda g: scale(g).astype(dtype), grads)


@pytest.mark.parametrize(
    "loss_scale",
    [mpjax.NoOpLossScale(), mpjax.StaticLossScale(128.0), mpjax.DynamicLossScale()],
    ids=lambda s: type(s).__name__,
)
def test_power_of_two_scaling_changes_no_bit(loss_scale):
    tx = mpjax.with_loss_scale(rich_optimizer(), loss_scale)
    plain = rich_optimizer()
    state, plain_state = tx.init(PARAMS), plain.init(PARAMS)
    params = plain_params = PARAMS
    for _ in range(5):
        updates, state = tx.update(scaled(GRADS, state), state, params)
        params = optax.apply_updates(params, updates)
        updates, plain_state = plain.update(GRADS, plain_state, plain_params)
        plain_params = optax.apply_updates(plain_params, updates)
    assert_same_bits(params, plain_params)
    assert_same_bits(state.inner_state, plain_state)


def test_clipping_inside_sees_unscaled_gradients():
    tx = mpjax.with_loss_scale(optax.clip_by_global_norm(1e3))
    state = tx.init(PARAMS)
    updates, _ = tx.update(scaled(GRADS, state), state, PARAMS)
    assert_same_bits(updates, GRADS)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_skipped_step_gives_zero_updates_and_keeps_the_inner_state(bad):
    tx = mpjax.with_loss_scale(rich_optimizer())
    state = tx.init(PARAMS)
    _, state = tx.update(scaled(GRADS, state), state, PARAMS)
    grads = {**GRADS, "b": GRADS["b"].at[1].set(bad)}
    updates, after = jax.jit(tx.update)(grads, state, PARAMS)
    assert_same_bits(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_same_bits(after.inner_state, state.inner_state)
    assert float(after.loss_scale.loss_scale) == 2.0**14
    assert not bool(after.grads_finite)
    assert (int(after.num_skipped), int(after.num_consecutive_skipped)) == (1, 1)
    _, after = tx.update(scaled(GRADS, after), after, PARAMS)
    assert bool(after.grads_finite)
    assert (int(after.num_skipped), int(after.num_consecutive_skipped)) == (1, 0)


def test_an_overflow_made_by_unscaling_is_seen():
    """A scale below one divides, so finite scaled gradients may overflow unscaled."""
    scale = mpjax.DynamicLossScale(2.0**-10, min_loss_scale=2.0**-10)
    tx = mpjax.with_loss_scale(optax.sgd(1.0), scale)
    state = tx.init(jnp.zeros(1))
    updates, state = tx.update(jnp.full(1, 2.0**125), state)
    assert float(updates[0]) == 0
    assert not bool(state.grads_finite)


def test_the_growth_step_unscales_by_the_scale_it_scaled_with():
    tx = mpjax.with_loss_scale(
        optax.sgd(1.0), mpjax.DynamicLossScale(8.0, growth_interval=1)
    )
    state = tx.init(jnp.zeros(1))
    for power in range(4):
        assert float(state.loss_scale.loss_scale) == 8 * 2**power
        updates, state = tx.update(scaled(jnp.full(1, 0.5), state), state)
        assert float(updates[0]) == -0.5


def test_the_state_never_changes_its_types():
    tx = mpjax.with_loss_scale(rich_optimizer())
    state = jax.jit(tx.init)(PARAMS)

    def step(state, bad):
        grads = jax.tree.map(lambda g: g + jnp.where(bad, jnp.inf, 0), GRADS)
        return tx.update(grads, state, PARAMS)[1], None

    after, _ = jax.lax.scan(step, state, jnp.array([False, True, False]))
    kinds = lambda tree: [
        (x.dtype, x.shape, x.weak_type) for x in jax.tree.leaves(tree)
    ]
    assert kinds(after) == kinds(state)
    assert int(after.num_skipped) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_gradients_and_parameters_are_optimised_in_float32(dtype):
    """A run in pure half has the same moments as the run in float32."""
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    grads = jax.tree.map(lambda g: (1e-4 * g).astype(dtype), GRADS)
    tx = mpjax.with_loss_scale(rich_optimizer(), mpjax.StaticLossScale(1024.0))
    state = tx.init(params)
    moments = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert all(x.dtype == jnp.float32 for x in moments)
    plain = rich_optimizer()
    full = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected, plain_state = plain.update(
        jax.tree.map(lambda g: g.astype(jnp.float32), grads), plain.init(full), full
    )
    updates, state = tx.update(scaled(grads, state), state, params)
    assert_same_bits(updates, expected)
    assert_same_bits(state.inner_state, plain_state)
    assert all(
        x.dtype == dtype for x in jax.tree.leaves(optax.apply_updates(params, updates))
    )


def test_integer_parameters_stay_even_under_weight_decay():
    params = {"w": jnp.ones(2), "table": jnp.array([7, 2049])}

    def loss(params):
        return jnp.sum(params["w"]) * params["table"][0]

    tx = mpjax.with_loss_scale(optax.adamw(0.1, weight_decay=0.5))
    state = tx.init(params)
    for _ in range(3):
        grads = jax.grad(
            lambda p, s=state: mpjax.scale_loss(loss(p), s), allow_int=True
        )(params)
        assert grads["table"].dtype == jax.dtypes.float0
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert params["table"].tolist() == [7, 2049]
    assert params["table"].dtype == jnp.int32
    assert float(params["w"][0]) < 0.8


def test_jmp_loss_scales_are_taken():
    theirs = jmp.DynamicLossScale(jnp.asarray(2.0**4), period=2)
    tx = mpjax.with_loss_scale(optax.sgd(1.0), theirs)
    state = tx.init(jnp.zeros(1))
    for _ in range(2):
        _, state = jax.jit(tx.update)(jnp.ones(1), state)
    assert float(state.loss_scale.loss_scale) == 2.0**5


def test_donating_a_state_leaves_the_loss_scale_object_alone():
    scale = jax.tree.map(jnp.asarray, mpjax.DynamicLossScale())
    tx = mpjax.with_loss_scale(optax.sgd(1.0), scale)
    step = jax.jit(lambda s: tx.update(jnp.ones(1), s)[1], donate_argnums=0)
    step(tx.init(jnp.zeros(1)))
    assert float(scale.loss_scale) == 2.0**15
    assert float(tx.init(jnp.zeros(1)).loss_scale.loss_scale) == 2.0**15


def test_scale_loss_needs_exactly_one_state():
    with pytest.raises(ValueError, match="wrap the optimizer"):
        mpjax.scale_loss(jnp.float32(1), optax.adam(0.1).init(PARAMS))
    twice = optax.chain(
        mpjax.with_loss_scale(optax.sgd(1.0)), mpjax.with_loss_scale(optax.sgd(1.0))
    )
    with pytest.raises(ValueError, match="2 loss scales"):
        mpjax.loss_scale_state(twice.init(PARAMS))


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="parse_loss_scale"):
        mpjax.with_loss_scale(optax.sgd(1.0), "dynamic")


def test_two_losses_with_an_optimizer_each():
    """Generator and critic: each has its own scale, and one overflow skips one."""
    tx = mpjax.with_loss_scale(optax.sgd(1.0))
    states = [tx.init(jnp.zeros(1)), tx.init(jnp.zeros(1))]
    grads = [jnp.array([jnp.inf]), scaled(jnp.ones(1), states[1])]
    out = [tx.update(g, s) for g, s in zip(grads, states, strict=True)]
    assert [float(u[0]) for u, _ in out] == [0.0, -1.0]
    assert [float(s.loss_scale.loss_scale) for _, s in out] == [2.0**14, 2.0**15]


@pytest.mark.parametrize("before", [optax.clip_by_global_norm(1.0), optax.scale(0.5)])
def test_a_loop_by_hand_is_told_of_what_comes_before(before):
    tx = optax.chain(before, mpjax.with_loss_scale(optax.sgd(0.1)))
    state = tx.init(jnp.ones(3))
    with pytest.warns(UserWarning, match="something comes before with_loss_scale"):
        mpjax.scale_loss(1.0, state)


@pytest.mark.parametrize("traced", [jax.jit, mpjax.autocast])
def test_a_loop_by_hand_is_told_of_a_scale_that_cannot_move(traced):
    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    params = jnp.ones(3)
    state = tx.init(params)

    def loss_fn(params, state=state):
        return mpjax.scale_loss(jnp.sum(params**2), state)

    with pytest.warns(UserWarning, match="Pass opt_state to that function as an arg"):
        traced(jax.grad(loss_fn))(params)
    traced(jax.grad(loss_fn))(params, state)
    jax.grad(loss_fn)(params)  # traced anew by each call
    constant = mpjax.with_loss_scale(optax.sgd(0.1), mpjax.StaticLossScale(8.0))
    traced(lambda x: mpjax.scale_loss(x, constant.init(params)))(1.0)


@pytest.mark.parametrize(
    "tx",
    [
        mpjax.with_loss_scale(
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
        ),
        optax.chain(
            mpjax.with_loss_scale(optax.sgd(1.0)), optax.add_decayed_weights(0.1)
        ),
        optax.masked(mpjax.with_loss_scale(optax.sgd(1.0)), True),
    ],
)
def test_a_loop_by_hand_is_not_told_otherwise(tx):
    assert float(mpjax.scale_loss(1.0, tx.init(jnp.ones(3)))) == 2.0**15


def test_the_scaled_loss_is_unscaled_by_the_state_that_scaled_it():
    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    state = tx.init(jnp.ones(3))
    scaled = mpjax.scale_loss(jnp.float32(0.3), state)
    found = mpjax.loss_scale_state(state).loss_scale.unscale(scaled)
    assert float(found) == float(jnp.float32(0.3))
