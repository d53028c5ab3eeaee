"""Broadcasts are made inside loops, so that no loop holds a mask at full size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.primitive_probes import W, X, eqns, rewrite
from jax import lax

import mpjax
from mpjax._jaxpr.core import check_jaxpr, open_jaxpr
from mpjax._jaxpr.loops import Scan

MASK = np.tril(np.ones((8, 8), bool))
LOWEST = np.finfo(np.float32).min


def attention(x, w):
    """Heads along axis 0, masked as flax does."""
    scores = jnp.einsum("qd,hkd->hqk", x @ w, jnp.stack([x] * 4))
    masked = jnp.where(MASK, scores, LOWEST)
    return x + jnp.einsum("hqk,kd->qd", jax.nn.softmax(masked), x), None


def loss(x, ws):
    return (lax.scan(attention, x, ws)[0] ** 2).mean()


WS = np.stack([W, W, W]) / 8


def constants(closed):
    scans = [Scan(eqn) for eqn in eqns(closed, "scan")]
    assert scans
    return [x for s in scans for x in s.split_operands(s.eqn.invars)[0]]


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.checkpoint])
def test_a_mask_is_not_held_at_the_size_of_the_scores(wrap):
    fn = lambda x, ws: lax.scan(wrap(attention), x, ws)[0].sum()
    closed = rewrite(jax.grad(fn, argnums=1), X / 8, WS)
    check_jaxpr(open_jaxpr(closed))
    assert all(x.aval.size <= MASK.size for x in constants(closed))


def test_the_numbers_are_those_of_the_plain_loop():
    grad = lambda *args: jax.value_and_grad(loss, argnums=(0, 1))(*args)
    x = X / 32  # larger scores make a gradient that any rounding changes by a tenth
    rewritten = mpjax.autocast(grad)(x, WS)
    for got, true in zip(
        jax.tree.leaves(rewritten), jax.tree.leaves(grad(x, WS)), strict=True
    ):
        np.testing.assert_allclose(got, true, atol=0.05 * np.abs(true).max())


def test_what_is_broadcast_twice_and_used_outside_too():
    def fn(x, ws, b):
        wide = jnp.broadcast_to(jnp.broadcast_to(b, (8, 8)), (3, 8, 8))
        step = lambda x, w: (jnp.tanh(x @ w) + wide.sum(0), None)
        return lax.scan(step, x, ws)[0] + wide[0]

    b = np.linspace(-1, 1, 8, dtype=np.float32)
    closed = rewrite(fn, X / 8, WS, b)
    assert [x.aval.shape for x in constants(closed)] == [(8,)]
    got = mpjax.autocast(fn, "mixed_float16")(X / 8, WS, b)
    np.testing.assert_allclose(got, fn(X / 8, WS, b), atol=0.02)
