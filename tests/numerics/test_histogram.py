"""Exponent histograms against numpy.frexp on bit patterns, special values included."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.tools import thinned
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mpjax import sharding
from mpjax.numerics import ExponentHistogram, empty_histogram, exponent_histogram

F16, BF16, F32, F64 = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
DTYPES = [F16, BF16, F32, F64]
WIDE = {"lo": -1074, "hi": 1023}


def ids(dtype):
    return np.dtype(dtype).name


def bit_patterns(dtype, size=20_000, seed=0):
    """Returns every number of 16 bits; random numbers of more, with special values."""
    info = ml_dtypes.finfo(dtype)
    unsigned = np.dtype(f"uint{info.bits}")
    if info.bits == 16:
        return np.arange(2**16, dtype=unsigned).view(dtype)
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**info.bits, size, dtype=unsigned)
    subnormal = bits & unsigned.type(2**info.nmant - 1)
    tiny = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, info.max, info.tiny], dtype)
    powers = np.ldexp(1.0, np.arange(info.minexp - info.nmant, info.maxexp))
    return np.concatenate(
        [bits.view(dtype), subnormal.view(dtype), tiny, powers.astype(dtype)]
    )


def by_frexp(x, lo, hi):
    """Returns the true zeros, below, counts, above, infs, nans."""
    with np.errstate(invalid="ignore"):  # A signalling NaN.
        x = np.asarray(x).astype(F64).ravel()
    finite = x[np.isfinite(x) & (x != 0)]
    exponents = np.frexp(finite)[1] - 1
    inside = exponents[(exponents >= lo) & (exponents <= hi)]
    return {
        "zeros": np.sum(x == 0),
        "below": np.sum(exponents < lo),
        "counts": np.bincount(inside - lo, minlength=hi - lo + 1),
        "above": np.sum(exponents > hi),
        "infs": np.sum(np.isinf(x)),
        "nans": np.sum(np.isnan(x)),
    }


def assert_counts(histogram, expected):
    for name, value in expected.items():
        np.testing.assert_array_equal(getattr(histogram, name), value, err_msg=name)


@pytest.mark.parametrize("bounds", [WIDE, {}, {"lo": -3, "hi": -3}], ids=str)
@pytest.mark.parametrize("dtype", thinned(DTYPES), ids=ids)
def test_every_bit_pattern(dtype, bounds):
    x = bit_patterns(dtype)
    with jax.enable_x64(True):
        found = jax.jit(partial(exponent_histogram, **bounds))(x)
    lo, hi = bounds.get("lo", -60), bounds.get("hi", 16)
    assert_counts(found, by_frexp(x, lo, hi))
    assert found.num_values == x.size
    np.testing.assert_array_equal(found.exponents, np.arange(lo, hi + 1))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(name):
    x = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name))
    assert_counts(exponent_histogram(x), by_frexp(x, -60, 16))


@settings(max_examples=12, deadline=None)
@given(
    # Of one length: what does not depend on the range is compiled once.
    st.lists(st.integers(0, 2**32 - 1), min_size=20, max_size=20),
    st.integers(-160, 130),
    st.integers(0, 40),
)
def test_any_range(bits, lo, width):
    x = np.array(bits, np.uint32).view(F32)
    found = exponent_histogram(x, lo=lo, hi=lo + width)
    assert_counts(found, by_frexp(x, lo, lo + width))


def test_leaves_are_counted_alone_or_together():
    tree = {
        "a": jnp.array([1.0, 2.0]),
        "b": [jnp.array(4.0, BF16), jnp.zeros((2, 0)), 0.5],
    }
    each = exponent_histogram(tree, per_leaf=True)
    assert jax.tree.structure(tree) == jax.tree.structure(
        each, is_leaf=lambda x: isinstance(x, ExponentHistogram)
    )
    assert int(each["a"].num_values) == 2
    assert int(each["b"][1].num_values) == 0
    whole = each["a"] + each["b"][0] + each["b"][1] + each["b"][2]
    together = exponent_histogram(tree)
    assert int(together.num_values) == 4
    jax.tree.map(np.testing.assert_array_equal, whole, together)


def test_histograms_add_up_from_nothing_but_not_of_other_ranges():
    h = exponent_histogram(jnp.ones(3), lo=-2, hi=2)
    jax.tree.map(np.testing.assert_array_equal, h, empty_histogram(-2, 2) + h)
    with pytest.raises(ValueError, match="same lo= and hi="):
        h + exponent_histogram(jnp.ones(3))
    with pytest.raises(TypeError):
        h + 1


def test_under_vmap_scan_and_jit():
    x = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(F32)
    each = jax.vmap(exponent_histogram)(x)
    assert each.counts.shape == (4, 77)
    assert each.zeros.shape == (4,)
    count = jax.jit(exponent_histogram)
    for i in range(4):
        one = count(x[i])
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), each, one
        )
    add = lambda total, x: (total + exponent_histogram(x), None)
    total, _ = jax.jit(lambda x: jax.lax.scan(add, empty_histogram(), x))(x)
    jax.tree.map(np.testing.assert_array_equal, total, exponent_histogram(x))


def test_under_grad_it_is_a_constant():
    def fn(x):
        h = exponent_histogram(jnp.exp(x))
        return jnp.sum(x**2), h

    grad, h = jax.grad(fn, has_aux=True)(jnp.arange(3.0))
    np.testing.assert_array_equal(grad, 2 * jnp.arange(3.0))
    assert int(h.num_values) == 3


def test_on_a_mesh_it_is_global():
    mesh = sharding.auto_mesh(jax.make_mesh((8,), ("data",)))
    x = bit_patterns(F32)[: 8 * 2000].reshape(8, 2000)
    expected = by_frexp(x, -60, 16)
    count = lambda x: exponent_histogram(x, axis_name="data")
    mapped = jax.shard_map(count, mesh=mesh, in_specs=P("data"), out_specs=P())
    assert_counts(jax.jit(mapped)(x), expected)
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
    assert_counts(jax.jit(exponent_histogram)(placed), expected)


@pytest.mark.parametrize(
    ("tree", "options", "error", "match"),
    [
        ({"n": jnp.arange(3)}, {}, TypeError, r"int32 at tree\['n'\]"),
        ([jnp.ones(2, complex)], {}, TypeError, r"complex64.*\.real"),
        (["text"], {}, TypeError, "str at"),
        ({}, {}, ValueError, "without leaves"),
        (None, {}, ValueError, "without leaves"),
        (jnp.ones(1), {"lo": 3, "hi": 2}, ValueError, "lo=3 is above hi=2"),
        (jnp.ones(1), {"lo": -1.5}, TypeError, "lo=-1.5"),
        (jnp.ones(1), {"hi": True}, TypeError, "hi=True"),
    ],
)
def test_bad_input(tree, options, error, match):
    with pytest.raises(error, match=match):
        exponent_histogram(tree, **options)


def test_more_numbers_than_int32_counts_are_refused():
    big = jax.ShapeDtypeStruct((2**16, 2**15), "float32")
    with pytest.raises(ValueError, match="in parts"):
        jax.eval_shape(exponent_histogram, big)
    small = jax.ShapeDtypeStruct((2**16, 2**14), "float32")
    assert jax.eval_shape(exponent_histogram, small).zeros.dtype == jnp.int32


def test_printed_it_has_a_line_per_exponent():
    text = str(exponent_histogram(jnp.array([0.0, 1.0, 4.0, jnp.nan])))
    assert [line.split()[0] for line in text.splitlines()] == [
        "zero", "2^0", "2^1", "2^2", "nan",
    ]  # fmt: skip
    assert "25.00%" in text
    assert "ExponentHistogram" in str(jax.vmap(exponent_histogram)(jnp.ones((2, 2))))
