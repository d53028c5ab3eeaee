"""Predicates on leaves, and sums over all gradients against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax._tree import is_floating, is_half, sum_of_squares

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("dtype", "floating", "half"),
    [
        (jnp.float16, True, True),
        (jnp.bfloat16, True, True),
        (jnp.float8_e4m3fn, True, True),
        (np.float32, True, False),
        (np.float64, True, False),
        (np.complex64, False, False),
        (np.int8, False, False),
        (np.bool_, False, False),
        (jax.dtypes.float0, False, False),
    ],
)
def test_half_and_floating_of_dtypes_arrays_and_abstract_values(dtype, floating, half):
    array = np.zeros(2, dtype)
    for x in (dtype, np.dtype(dtype), array, jax.ShapeDtypeStruct((2,), dtype)):
        assert (is_floating(x), is_half(x)) == (floating, half)


@pytest.mark.parametrize("x", [None, 1.0, 2, "text", KEY, KEY.dtype], ids=str)
def test_values_without_a_real_dtype_are_neither(x):
    assert not is_floating(x)
    assert not is_half(x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_sum_of_squares(dtype):
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=shape).astype("f4") for shape in [(), (300,), (70, 80)]]
    tree = [jnp.asarray(x).astype(dtype) for x in leaves]
    expected = sum(np.sum(np.abs(np.asarray(x, np.complex128)) ** 2) for x in tree)
    tree += [jnp.arange(9), jax.random.key(0), np.zeros(2, jax.dtypes.float0), 3]
    total = jax.jit(lambda t: sum_of_squares([*t, 0.0]))(tree[:4])
    assert total.dtype == jnp.float32
    assert float(sum_of_squares(tree)) == pytest.approx(expected, rel=1e-5)
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_a_large_half_array_does_not_overflow():
    x = jnp.full((1000, 1000), 60000.0, jnp.float16)
    assert float(sum_of_squares(x)) == pytest.approx(60000.0**2 * 1e6, rel=0.01)


def test_no_numbers_no_norm():
    assert float(sum_of_squares({})) == 0
    assert float(sum_of_squares([jnp.arange(3)])) == 0


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("where", [0, 511, 1023])
def test_one_bad_value_shows(bad, where):
    x = jnp.zeros((32, 32)).at[where // 32, where % 32].set(bad)
    assert not np.isfinite(float(jax.jit(sum_of_squares)(x)))
