"""What float8 keeps of the operands that a probe counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from mpjax._autocast import float8
from mpjax.numerics import (
    empty_histogram,
    exponent_histogram,
    float8_fraction,
    probe,
)

DTYPES = {"float8_e4m3fn": jnp.float8_e4m3fn, "float8_e5m2": jnp.float8_e5m2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1, 8, 20])
def test_the_shares_are_those_of_quantizing(dtype, spread):
    rng = np.random.default_rng(spread)
    x = rng.choice([-1, 1], 4096) * np.exp2(rng.uniform(-spread, 0, 4096))
    x[0] = 1.5  # Of a fraction for which rules by exponent and by number agree.
    x = jnp.asarray(x, jnp.float32)
    found = float8_fraction(exponent_histogram(x, lo=-40, hi=10), dtype)
    values = np.asarray(float8.quantize(x, DTYPES[dtype]).values, np.float64)
    smallest = float(jnp.finfo(dtype).smallest_normal)
    assert found.zero == np.mean(values == 0)
    assert found.overflow == 0
    # Numbers just below the smallest normal one round up to it.
    is_subnormal = (values != 0) & (np.abs(values) < smallest)
    assert abs(found.subnormal - np.mean(is_subnormal)) < 0.01


def test_no_numbers_no_shares():
    assert sum(float8_fraction(empty_histogram(), "float8_e4m3fn")) == 0


@pytest.mark.filterwarnings("ignore:mixed_float8:UserWarning")
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float8"])
def test_operands_are_counted_before_they_are_rounded(policy, monkeypatch):
    monkeypatch.setattr(float8, "_FLOPS_PER_BYTE", 1e-3)
    x = jax.random.normal(jax.random.key(0), (32, 16))
    w = jax.random.normal(jax.random.key(1), (16, 8))
    fn = mpjax.autocast(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), policy)
    outputs, found = probe(fn, operands=True)(w, x)
    np.testing.assert_array_equal(outputs, jax.jit(fn)(w, x))
    assert list(found) == ["dot_general", "dot_general (backward)"]
    half = lambda a: exponent_histogram(a.astype(jnp.bfloat16))
    forward = found["dot_general"].operands
    for own, expected in zip(forward, (half(x), half(w)), strict=True):
        np.testing.assert_array_equal(own.counts, expected.counts)
    # The output is the product, not that of the scaled operands.
    histograms = found["dot_general"].values, exponent_histogram(x @ w)
    largest = [np.flatnonzero(each.counts)[-1] for each in histograms]
    assert abs(largest[0] - largest[1]) <= 1
    plain = probe(fn)(w, x)[1]
    assert plain["dot_general"].operands == ()
