"""Weights that a scan casts at every step are cast once before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cells import CELLS, WIDTH, W, X, evaluate, in_half, scans
from helpers.tools import assert_same_bits, thinned
from jax import lax

from mpjax import autocast
from mpjax._autocast.hoist import hoist_casts_out_of_scans
from mpjax._jaxpr.core import check_jaxpr, open_jaxpr
from mpjax._jaxpr.loops import Scan


def hoisted(closed):
    new = hoist_casts_out_of_scans(closed)
    check_jaxpr(open_jaxpr(new))
    return new


def num_casts_of_constants(closed):
    """Returns the number of casts to half, in bodies of scans, of their constants."""
    found = 0
    for scan in scans(closed):
        body = open_jaxpr(scan.params["jaxpr"])
        constants = body.invars[: Scan(scan).num_consts]
        found += sum(
            eqn.primitive.name == "convert_element_type"
            and eqn.invars[0] in constants
            and eqn.outvars[0].aval.dtype.itemsize == 2
            for eqn in body.eqns
        )
    return found


@pytest.mark.parametrize("policy", thinned(["mixed_bfloat16", "mixed_float16"]))
@pytest.mark.parametrize("name", thinned(CELLS))
def test_values_are_bitwise_the_same(name, policy):
    closed = in_half(jax.make_jaxpr(jax.value_and_grad(CELLS[name]))(W, X), policy)
    assert_same_bits(evaluate(hoisted(closed), W, X), evaluate(closed, W, X))


@pytest.mark.parametrize("name", ["gated", "lstm", "nested", "reversed", "jit", "vmap"])
def test_no_cast_of_a_weight_is_left_in_a_loop(name):
    closed = in_half(jax.make_jaxpr(jax.grad(CELLS[name]))(W, X), "mixed_bfloat16")
    assert num_casts_of_constants(closed) >= 2
    assert num_casts_of_constants(hoisted(closed)) == 0
    cast = jax.make_jaxpr(autocast(jax.grad(CELLS[name])))(W, X)
    assert num_casts_of_constants(cast) == 0


def test_one_half_weight_serves_all_that_take_it():
    def fn(w, x):
        step = lambda h, x: (jnp.tanh(h @ w) + jnp.sin(x @ w), None)
        return lax.scan(step, jnp.zeros(x.shape[1:]), x)[0]

    closed = in_half(jax.make_jaxpr(fn)(W[0][:, :WIDTH], X), "mixed_bfloat16")
    (new,) = scans(hoisted(closed))
    assert Scan(new).num_consts == 2


def test_without_a_cast_the_jaxpr_is_the_same_object():
    for fn in (CELLS["gated"], lambda w, x: x @ w[0]):
        closed = jax.make_jaxpr(fn)(W, X)
        assert hoist_casts_out_of_scans(closed) is closed
    closed = in_half(closed, "mixed_bfloat16")
    assert hoist_casts_out_of_scans(closed) is closed


def long_recurrence(w, x):
    step = lambda h, x: (0.9 * h + 0.1 * jnp.tanh(h @ w + x), None)
    return jnp.mean(lax.scan(step, x[0], x)[0] ** 2)


@pytest.mark.parametrize(
    "form", thinned(["grad(autocast)", "grad(autocast(grad))", "jvp"])
)
def test_the_gradient_accumulates_in_float32_however_it_is_taken(form):
    """In bfloat16 a large sum would lose the share of a single step."""
    rng = np.random.default_rng(1)
    w = (rng.normal(size=(8, 8)) / 3).astype(np.float32)
    x = rng.normal(size=(2000, 4, 8)).astype(np.float32)

    def differentiated(wrap):
        if form == "grad(autocast)":
            return jax.grad(wrap(long_recurrence))
        if form == "jvp":
            return lambda w, x: jax.jvp(
                lambda w: wrap(long_recurrence)(w, x), (w,), (w,)
            )[1]
        grad = wrap(jax.grad(long_recurrence))
        return jax.grad(lambda w, x: jnp.sum(grad(w, x) * w))

    found = jax.jit(differentiated(autocast))(w, x)
    expected = jax.jit(differentiated(lambda fn: fn))(w, x)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 0.01
