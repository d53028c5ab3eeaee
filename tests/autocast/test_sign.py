"""A comparison with zero takes the half value if all other consumers do.

The derivative of relu compares `x > 0`. If it took the float32 sum before the cast to
half, a second copy of every activation would be saved for the backward pass.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.primitive_probes import (
    BF16,
    EYE,
    F16,
    F32,
    POLICIES,
    H,
    W,
    X,
    by_ops,
    eqns,
    floats,
    outputs,
    rewrite,
    rounded,
)

from mpjax import autocast

DTYPES = dict(zip(("mixed_float16", "mixed_bfloat16"), (F16, BF16), strict=True))


def relu_net(w, x, activation=jax.nn.relu):
    h = activation(x @ w + 1 / 3)
    return jnp.sum(h @ w)


def clipped(x):
    return jnp.where(x > 0, x, 0)


def leaky(x):
    return jnp.where(x >= 0, x, x / 8)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("activation", [jax.nn.relu, clipped])
def test_the_mask_of_relu_is_taken_from_the_half_value(activation, policy):
    grad = jax.grad(relu_net)
    closed = rewrite(lambda w, x: grad(w, x, activation), W, X, policy=policy)
    (comparison,) = eqns(closed, "gt")
    assert floats(comparison) == {DTYPES[policy]}


@pytest.mark.parametrize("policy", POLICIES)
def test_it_stays_float32_where_another_consumer_takes_float32(policy):
    def fn(w, x):
        h = x @ w + 1 / 3
        return jnp.sum(clipped(h) @ w) + jnp.sum(jnp.log(jnp.abs(h)))

    for comparison in eqns(rewrite(fn, W, X, policy=policy), "gt"):
        assert floats(comparison) == {F32}
    closed = rewrite(lambda w, x: leaky(x @ w + 1 / 3) @ w, W, X, policy=policy)
    for comparison in (*eqns(closed, "le"), *eqns(closed, "ge")):
        assert floats(comparison) == {F32}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_comparison_with_another_number_stays_float32(policy):
    def fn(w, x):
        h = x @ w + 1 / 3
        return jnp.where(h > 1 / 3, h, 0) @ w

    (comparison,) = eqns(rewrite(fn, W, X, policy=policy), "gt")
    assert floats(comparison) == {F32}


@pytest.mark.parametrize("policy", POLICIES)
def test_an_equality_stays_float32(policy):
    def fn(w, x):
        h = x @ w + 1 / 3
        return jnp.where(h == 0, 1.0, h) @ w

    (comparison,) = eqns(rewrite(fn, W, X, policy=policy), "eq")
    assert floats(comparison) == {F32}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_mask_equals_float32s_except_where_half_underflows(policy):
    """float16 flushes (0, 2^-25) to zero: no output of relu there, and no gradient."""
    tiny = 2.0**-30
    bias = jnp.asarray([-1.0, -tiny, 0.0, tiny, 1.0, 2.0, -2.0, np.nan])

    def masks(w, b):
        h = jnp.zeros((1, 8)) @ w + b
        return jnp.where(h > 0, h, 0) @ w, h > 0

    def through(w, b):
        return jax.grad(lambda b: jnp.sum(jax.nn.relu(jnp.zeros((1, 8)) @ w + b) @ w))(
            b
        )

    w = jnp.eye(8)
    expected = jnp.asarray([0, 0, 0, 1, 1, 1, 0, 0.0])
    if policy == "mixed_float16":
        expected = expected.at[3].set(0)
    np.testing.assert_array_equal(autocast(through, policy)(w, bias), expected)
    outputs, mask = autocast(masks, policy)(w, bias)
    np.testing.assert_array_equal(mask[0], expected > 0)
    np.testing.assert_array_equal(outputs[0, :3], [0, 0, 0])


def test_nothing_changes_without_a_matmul():
    closed = rewrite(lambda h: jnp.where(h > 0, h, 0), H)
    (comparison,) = eqns(closed, "gt")
    assert floats(comparison) == {F32}


def test_a_choice_between_half_numbers_is_made_in_half():
    for constant in (0.5, -2.0, 0.0):
        fn = lambda x, c=constant: jnp.where(x > 0, x @ W, c) @ EYE
        for policy, half in POLICIES.items():
            closed = rewrite(fn, X, policy=policy)
            assert outputs(closed, "select_n") == [half]
            assert outputs(closed, "dot_general") == [half, half]
            expected = np.where(X > 0, rounded(H, half), constant)
            np.testing.assert_array_equal(by_ops(closed, X)[0], expected)
