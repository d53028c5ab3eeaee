"""Losses of each format, compared with real casts, and the advised loss scale."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.tools import thinned
from hypothesis import given, settings
from hypothesis import strategies as st

from mpjax.numerics import (
    exponent_histogram,
    recommend_loss_scale,
    representable_fraction,
)
from mpjax.numerics._formats import FORMATS

RANGE = {"lo": -149, "hi": 127}
TYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def edges(name):
    """Returns numbers at each edge of a format, and a float32 ulp beside it."""
    info = ml_dtypes.finfo(TYPES[name])
    top, tiny = float(info.max), float(info.smallest_normal)
    small = float(info.smallest_subnormal)
    ulp = np.ldexp(1.0, info.maxexp - 1 - info.nmant)
    at = np.array(
        [small / 2, small, 1.5 * small, tiny, tiny - small, top, top + ulp / 2],
        np.float64,
    ).astype(np.float32)
    at = at[np.isfinite(at)]
    return np.concatenate(
        [at, np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(np.inf))]
    )


def by_casting(x, name, loss_scale):
    """Returns the shares of zero, subnormal and overflow of numbers really cast."""
    x = np.asarray(x)
    x = x[np.isfinite(x) & (x != 0)].astype(np.float64) * loss_scale
    # Exact: float64 holds the scaled float32, and NumPy rounds once.
    with np.errstate(all="ignore"):
        y = x.astype(TYPES[name]).astype(np.float64)
    tiny = float(ml_dtypes.finfo(TYPES[name]).smallest_normal)
    overflow = ~np.isfinite(y)
    zero = y == 0
    subnormal = (np.abs(x) < tiny) & ~zero
    return np.mean(zero), np.mean(subnormal), np.mean(overflow)


def assert_as_cast(x, name, loss_scale):
    found = representable_fraction(exponent_histogram(x, **RANGE), name, loss_scale)
    expected = by_casting(x, name, loss_scale)
    got = (found.zero, found.subnormal, found.overflow)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(sum(found), 1)


@pytest.mark.parametrize("exponent", thinned(range(-30, 31, 10)))
@pytest.mark.parametrize("name", FORMATS)
def test_as_many_are_lost_as_by_casting(name, exponent):
    rng = np.random.default_rng(exponent + 100)
    spread = np.exp2(rng.uniform(-40, 30, 4000)) * rng.choice([-1, 1], 4000)
    bits = rng.integers(0, 2**32, 4000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([spread.astype(np.float32), bits, edges(name)])
    assert_as_cast(x, name, 2.0**exponent)


@settings(max_examples=15, deadline=None)
@given(
    # Of one length, for which counting is compiled once.
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=12,
        max_size=12,
    )
    .map(lambda x: np.array(x, np.float32))
    .filter(lambda x: np.any(x != 0)),
    st.sampled_from(sorted(FORMATS)),
    st.integers(-20, 20),
)
def test_any_numbers(x, name, exponent):
    assert_as_cast(x, name, 2.0**exponent)


@pytest.mark.parametrize("name", thinned(FORMATS))
def test_jax_casts_alike(name):
    """All but subnormal float32, which XLA may flush."""
    x = np.concatenate([edges(name), np.float32([1.0, 3.0])])
    x = x[np.abs(x) >= np.finfo(np.float32).tiny]
    cast = np.asarray(jnp.asarray(x).astype(name)).astype(np.float32)
    found = representable_fraction(exponent_histogram(x, **RANGE), name)
    np.testing.assert_allclose(found.overflow, np.mean(~np.isfinite(cast)))
    if name != "bfloat16":
        np.testing.assert_allclose(found.zero, np.mean(cast == 0))


def test_beyond_the_range_numbers_count_as_of_the_next_exponent():
    h = exponent_histogram(jnp.array([2.0**-40, 2.0**-10, 2.0**30]), lo=-20, hi=10)
    third = pytest.approx(1 / 3)
    assert representable_fraction(h, "float16") == (0, third, pytest.approx(2 / 3), 0)
    assert representable_fraction(h, "float16", 2.0**-5).zero == third
    assert representable_fraction(h, "float16", 2.0**5).overflow == third


@pytest.mark.slow
def test_under_jit_the_scale_may_be_traced():
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 1e-6
    h = exponent_histogram(x)
    traced = jax.jit(lambda h, s: representable_fraction(h, "float16", s))
    for scale in (1.0, 2.0**10, 2.0**40):
        found, known = traced(h, scale), representable_fraction(h, "float16", scale)
        np.testing.assert_allclose(found, known, rtol=1e-6)
        assert found.zero.dtype == jnp.float32
    batch = jax.vmap(exponent_histogram)(x.reshape(4, 250))
    each = jax.vmap(lambda h: representable_fraction(h, "float16"))(batch)
    assert each.zero.shape == (4,)


def test_without_numbers_nothing_is_lost():
    h = exponent_histogram(jnp.array([0.0, jnp.nan, jnp.inf]))
    assert representable_fraction(h, "float16") == (0, 0, 0, 0)
    advice = recommend_loss_scale(h)
    assert advice.loss_scale == 1
    assert "Every number is zero" in advice.reason
    assert "2 Inf or NaN ignored" in advice.reason


def like_figure_3(size=200_000, seed=0):
    """Activation gradients as in figure 3: 67 % zeros, the rest mostly below 2^-24."""
    rng = np.random.default_rng(seed)
    exponents = rng.normal(-28, 4, size)
    return np.where(rng.random(size) < 0.67, 0, np.exp2(exponents)).astype(np.float32)


def test_on_the_gradients_of_figure_3_it_advises_at_least_8():
    h = exponent_histogram(like_figure_3())
    assert int(h.zeros) / int(h.num_values) == pytest.approx(0.67, abs=0.01)
    advice = recommend_loss_scale(h, "float16")
    assert advice.loss_scale >= 8
    by_scale = {row.loss_scale: row for row in advice.table}
    chosen = by_scale[advice.loss_scale]
    assert chosen.overflow == 0
    assert chosen.zero < by_scale[8.0].zero < by_scale[1.0].zero
    assert chosen.zero == min(row.zero for row in advice.table if not row.overflow)
    assert "becomes zero in float16" in advice.reason
    assert f"2^{int(np.log2(advice.loss_scale))}" in advice.reason
    assert recommend_loss_scale(h, "bfloat16").loss_scale == 1


@pytest.mark.parametrize(
    ("numbers", "scale", "reason"),
    [
        ([1.0, 2.0], 1, "holds every number in full"),
        ([2.0**-20, 1.0], 2**6, "loses bits from 50.000% to 0.000%"),
        ([2.0**-28, 2.0**10], 2**4, "no headroom"),
        ([2.0**-30, 2.0**10], 1, "No scale that leaves the largest number room"),
        ([2.0**-30, 2.0**15], 1, "No scale that leaves the largest number room"),
        ([1.0, 1e6], 1, "use bfloat16 or float32"),
    ],
)
def test_the_advice_says_why(numbers, scale, reason):
    advice = recommend_loss_scale(exponent_histogram(jnp.array(numbers), hi=30))
    assert advice.loss_scale == scale
    assert reason in advice.reason
    assert advice.reason.endswith(".")
    assert str(advice).startswith(advice.reason)
    assert len(str(advice).splitlines()) == 2 + 25


def test_headroom_is_kept_where_there_is_room():
    wide = np.exp2(np.arange(-40.0, 0.5)).astype(np.float32)
    h = exponent_histogram(wide)
    scales = [recommend_loss_scale(h, headroom=n).loss_scale for n in (0, 1, 3, 40)]
    assert scales == [2.0**15, 2.0**14, 2.0**12, 2.0**15]
    almost = exponent_histogram(np.append(wide, np.float32(2 - 2.0**-12)))
    assert recommend_loss_scale(almost, headroom=0).loss_scale == 2.0**14


def test_bad_input():
    h = exponent_histogram(jnp.ones(2))
    for dtype in ("float32", "float13", "int8", None):
        with pytest.raises(ValueError, match="expected one of float16, bfloat16"):
            representable_fraction(h, dtype)
    for scale in (3.0, 0.0, -2.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="power of two"):
            representable_fraction(h, "float16", scale)
    with pytest.raises(TypeError, match="outside"):
        jax.jit(lambda h: recommend_loss_scale(h).loss_scale)(h)
    with pytest.raises(ValueError, match="headroom"):
        recommend_loss_scale(h, headroom=-1)
    with pytest.raises(ValueError, match="max_loss_scale"):
        recommend_loss_scale(h, max_loss_scale=0.5)
