"""The rules of autocast, one by one, on the rewritten jaxpr and against NumPy.

Matrices hold small integers, so that a matmul in half is exact and later operations can
be predicted bitwise.
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
    assert_dots,
    body,
    by_ops,
    eqns,
    floats,
    integers,
    outputs,
    rewrite,
    rounded,
)
from helpers.tools import thinned
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

import mpjax
from mpjax import autocast
from mpjax._jaxpr.core import dtype_of, open_jaxpr

# --- Float32 where every consumer wants it.


def logsumexp_of_sum(x, w, v):
    return jax.nn.logsumexp(x @ w + x @ v, axis=-1)


def softmax_of_difference(x, w, v):
    return jax.nn.softmax((x @ w - x @ v) / 3)


def fast_variance(x, w, v):
    h = x @ w * (x @ v)
    return jnp.mean(h * h, -1) - jnp.mean(h, -1) ** 2


@pytest.mark.parametrize("policy", thinned(POLICIES))
@pytest.mark.parametrize("fn", [logsumexp_of_sum, softmax_of_difference, fast_variance])
def test_sums_run_in_float32_for_consumers_that_want_it(fn, policy):
    """The matmuls are exact, so the result is float64's; in half it would not be."""
    x, w, v = (
        integers(2, 8, 64, high=1),
        integers(3, 64, 32, high=1),
        integers(4, 64, 32, high=1),
    )
    closed = rewrite(fn, x, w, v, policy=policy)
    assert_dots(closed, POLICIES[policy], 2)
    assert set(outputs(closed, "add", "sub", "mul", "div")) == {F32}
    with jax.enable_x64(True):
        truth = fn(*map(np.float64, (x, w, v)))
    np.testing.assert_allclose(autocast(fn, policy)(x, w, v), truth, rtol=3e-5)


def test_the_error_of_a_softmax_is_that_of_its_logits():
    rng = np.random.default_rng(0)
    x, w, v = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(3))
    w, v = w / 2, v / 2
    with jax.enable_x64(True):
        truth = np.asarray(softmax_of_difference(*map(np.float64, (x, w, v))))
    cast = [jnp.asarray(a, jnp.bfloat16) for a in (x, w, v)]
    by_hand = np.float64(softmax_of_difference(*cast).astype(jnp.float32))
    (y,) = by_ops(rewrite(softmax_of_difference, x, w, v), x, w, v)
    error = lambda y: np.linalg.norm(np.asarray(y) - truth) / np.linalg.norm(truth)
    assert 1e-3 < error(y) < min(0.01, 0.7 * error(by_hand))


def test_a_sum_that_some_consumer_takes_in_half_runs_in_half():
    half = lambda x, w: ((x @ w + w @ x) @ w).sum()
    both = lambda x, w: jnp.exp(h := x @ w + w @ x).sum() + (h @ w).sum()
    full = lambda x, w: jnp.exp(x @ w + w @ x).sum()
    wider = lambda x, w: ((x @ w + x) @ w).sum()
    for fn, dtype in ((half, BF16), (both, BF16), (full, F32), (wider, BF16)):
        assert outputs(rewrite(fn, X, W), "add")[0] == dtype


def test_demand_passes_through_calls():
    inner = jax.jit(lambda a, b: a + b)
    full = lambda x, w: jnp.exp(inner(x @ w, w @ x)).sum()
    half = lambda x, w: (inner(x @ w, w @ x) @ w).sum()
    assert outputs(rewrite(full, X, W), "add") == [F32]
    assert outputs(rewrite(half, X, W), "add") == [BF16]


# --- Constants.

WITH_CONSTANT = {
    "literal": lambda h, c: h * c,
    "on the left": lambda h, c: c - h,
    "float32 scalar": lambda h, c: h + jnp.float32(c),
    "broadcast": lambda h, c: h * jnp.full(h.shape, c),
    "broadcast and reshaped": lambda h, c: h * jnp.full((1, 1, 8), c).reshape(1, 8),
    "argument of a jit": lambda h, c: jax.jit(jnp.multiply)(h, c),
    "inside of two": lambda h, c: jax.jit(lambda a: jax.jit(lambda b: b * c)(a))(h),
    "jnp.where": lambda h, c: jnp.where(h > 3, h, c),
    "jnp.clip": lambda h, c: jnp.clip(h, -c, c),
    "converted": lambda h, c: h * jnp.asarray(np.float32(c)).astype(jnp.float32),
}
COMPUTED = ("mul", "sub", "add", "select_n", "max", "min")


@pytest.mark.parametrize("policy", thinned(POLICIES))
@pytest.mark.parametrize("how", WITH_CONSTANT)
def test_a_constant_is_never_rounded(how, policy):
    dtype = POLICIES[policy]
    op = lambda h: WITH_CONSTANT[how](h, 0.1)
    fn = lambda x: op(x @ W) @ EYE
    closed = rewrite(fn, X, policy=policy)
    assert_dots(closed, dtype, 2)
    assert set(outputs(closed, *COMPUTED)) == {F32}
    # The sum is computed in float32, and rounded once.
    expected = rounded(op(jnp.asarray(rounded(H, dtype))), dtype)
    np.testing.assert_array_equal(by_ops(closed, X)[0], expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_rounding_the_constant_would_show(policy):
    naive = rounded(H * rounded(0.1, POLICIES[policy]), POLICIES[policy])
    closed = rewrite(lambda x: (x @ W * 0.1) @ EYE, X, policy=policy)
    assert (by_ops(closed, X)[0] != naive).any()


@pytest.mark.parametrize("policy", thinned(POLICIES))
@pytest.mark.parametrize("constant", [0.5, -2.0, 0.0])
@pytest.mark.parametrize("how", thinned(sorted(WITH_CONSTANT.keys() - {"jnp.where"})))
def test_a_constant_that_half_holds_leaves_the_op_in_half(how, constant, policy):
    fn = lambda x: WITH_CONSTANT[how](x @ W, constant) @ EYE
    closed = rewrite(fn, X, policy=policy)
    assert set(outputs(closed, *COMPUTED)) == {POLICIES[policy]}
    np.testing.assert_array_equal(
        by_ops(closed, X)[0],
        rounded(WITH_CONSTANT[how](H, constant), POLICIES[policy]),
    )


def test_an_infinite_mask_is_exact_in_half():
    fn = lambda x: jnp.where(x > 0, x @ W, -jnp.inf).max() * EYE @ EYE
    assert outputs(rewrite(fn, X, policy="mixed_float16"), "select_n") == [F16]


@pytest.mark.parametrize(
    ("constant", "policy"),
    [
        (-1e30, "mixed_float16"),
        (float(np.finfo(np.float32).min), "mixed_float16"),
        (float(np.finfo(np.float32).min), "mixed_bfloat16"),
        (1e-12, "mixed_float16"),
    ],
)
@pytest.mark.parametrize("op", ["where", "maximum"])
def test_a_constant_out_of_range_stays_float32(op, constant, policy):
    def fn(x):
        h = x @ W
        y = jnp.where(h > 0, h, constant) if op == "where" else jnp.maximum(h, constant)
        return y, y @ EYE

    closed = rewrite(fn, X, policy=policy)
    assert set(outputs(closed, "select_n", "max")) == {F32}
    expected = np.where(H > 0, H, np.float32(constant))
    expected = expected if op == "where" else np.maximum(H, np.float32(constant))
    np.testing.assert_array_equal(by_ops(closed, X)[0], expected)


def test_an_epsilon_is_not_lost():
    fn = lambda x: 1 / (jnp.abs(x @ (0 * W)) + 1e-12)
    np.testing.assert_allclose(autocast(fn, "mixed_float16")(X), 1e12, rtol=1e-6)


# --- Casts.


def test_a_weight_is_cast_at_every_use():
    def fn(w):
        return sum(jnp.sum((X + i) @ w) for i in range(64))

    inside = body(rewrite(fn, W))
    w = inside.invars[-1]
    casts = [e for e in inside.eqns if e.invars[0] is w]
    assert len(casts) == 64
    assert {floats(e) == {F32, BF16} for e in casts} == {True}


UNIT = np.array([[1.0, 0.0], [0.0, 0.0]], np.float32)


def unrolled(w, num):
    return sum(jnp.sum(UNIT @ w) for _ in range(num))


def scanned(w, num):
    step = lambda total, _: (total + jnp.sum(UNIT @ w), None)
    return lax.scan(step, 0.0, None, length=num)[0]


@pytest.mark.parametrize("order", ["inside", "outside"])
@pytest.mark.parametrize(
    ("loss", "num", "policy"),
    [
        pytest.param(unrolled, 300, "mixed_bfloat16", marks=pytest.mark.slow),
        (scanned, 4096, "mixed_bfloat16"),
        (scanned, 4096, "mixed_float16"),
    ],
)
def test_cotangents_of_a_weight_add_up_in_float32(loss, num, policy, order):
    """In half they would stop at 256 or 2048, where adding one changes nothing."""
    fn = lambda w: loss(w, num)
    inside, outside = jax.grad(autocast(fn, policy)), autocast(jax.grad(fn), policy)
    grad = inside if order == "inside" else outside
    w = np.ones((2, 3), np.float32)
    closed = jax.make_jaxpr(grad)(w)
    dots = eqns(closed, "dot_general")
    assert {dtype_of(v) for e in dots for v in e.outvars} == {POLICIES[policy]}
    result = grad(w) if loss is scanned else by_ops(closed, w)[0]
    np.testing.assert_array_equal(result, [[num] * 3, [0] * 3])


# --- Matmuls that are left alone, and matmuls that are not.

FINE = (1 + integers(5, 8, 8) / 1e4).astype(np.float32)


@pytest.mark.parametrize(
    "precision",
    [lax.Precision.HIGHEST, "high", (lax.Precision.HIGHEST, lax.Precision.DEFAULT)],
)
def test_a_matmul_that_asks_for_precision_is_left_alone(precision):
    fn = lambda x: jnp.matmul(x, x, precision=precision)
    (dot,) = eqns(rewrite(fn, FINE), "dot_general")
    (traced,) = eqns(jax.make_jaxpr(fn)(FINE), "dot_general")
    assert floats(dot) == {F32}
    assert dot.params == traced.params
    np.testing.assert_array_equal(autocast(fn)(FINE), jax.jit(fn)(FINE))


@pytest.mark.parametrize("ambient", ["highest", "high", "float32", "BF16_BF16_F32_X3"])
def test_an_ambient_precision_is_no_opt_out(ambient):
    plain = lambda x: x @ W
    asking = lambda x: jnp.matmul(x, W, precision=lax.Precision.DEFAULT)
    with jax.default_matmul_precision(ambient):
        for fn in (plain, asking):
            closed = rewrite(fn, X)
            assert_dots(closed, BF16, 1)
            assert eqns(closed, "dot_general")[0].params["precision"] is None


def test_an_explicit_precision_beside_another_ambient_one_is_left_alone():
    fn = lambda x: jnp.matmul(x, W, precision=lax.Precision.HIGHEST)
    with jax.default_matmul_precision("high"):
        assert_dots(rewrite(fn, X), F32, 1)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[:, :1] @ x[:1],
        lambda x: lax.dot_general(x[0], x[0], (((), ()), ((), ()))),
        lambda x: lax.dot_general(x, x, (((), ()), ((0, 1), (0, 1)))),
    ],
)
def test_a_matmul_that_adds_nothing_up_stays_float32(fn):
    assert_dots(rewrite(fn, FINE), F32, 1)
    np.testing.assert_array_equal(autocast(fn)(FINE), jax.jit(fn)(FINE))


SCALAR_PRODUCTS = {
    "vdot": jnp.vdot,
    "inner": jnp.inner,
    "@": lambda x, y: x @ y,
    "row @ column": lambda x, y: x[None] @ y[:, None],
    "einsum": lambda x, y: jnp.einsum("i,i->", x, y),
    "two axes": lambda x, y: jnp.tensordot(x.reshape(2, -1), y.reshape(2, -1), 2),
    "batched": lambda x, y: jnp.einsum("bi,bi->b", x[None], y[None]),
    "mapped": lambda x, y: jax.vmap(jnp.vdot)(x[None], y[None]),
    "scanned": lambda x, y: lax.map(lambda xy: jnp.vdot(*xy), (x[None], y[None])),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", thinned(SCALAR_PRODUCTS))
def test_a_scalar_product_is_a_sum_and_runs_in_float32(name, policy):
    """In float16 it would be infinite, in bfloat16 a sum of 256s would not grow."""
    fn = SCALAR_PRODUCTS[name]
    x, y = jnp.ones(70000), jnp.full(70000, 1 + 2.0**-10)
    right = 70000 * (1 + 2.0**-10)
    for cast in (autocast(fn, policy), jax.jit(autocast(fn, policy))):
        assert float(cast(x, y).squeeze()) == pytest.approx(right, rel=1e-6)
    text = str(mpjax.autocast_report(fn, policy)(x, y))
    assert "a scalar product, which is a sum" in text
    gradient = autocast(jax.grad(lambda x: fn(x, y).squeeze()), policy)(x)
    np.testing.assert_array_equal(gradient, y)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_product_with_one_free_axis_is_a_matmul(policy):
    for fn in (
        lambda x: x @ x[0],
        lambda x: x[0] @ x,
        lambda x: jnp.einsum("bi,bji->bj", x, jnp.stack([x, x], 1)),
    ):
        half = {"mixed_float16": F16, "mixed_bfloat16": BF16}[policy]
        assert_dots(rewrite(fn, X, policy=policy), half, 1)


def test_the_matmuls_own_preferred_type():
    fn = lambda x, dtype: jnp.matmul(x, W, preferred_element_type=dtype)
    closed = rewrite(lambda x: fn(x, jnp.float32), X)
    assert_dots(closed, BF16, 1)
    assert eqns(closed, "dot_general")[0].params["preferred_element_type"] == BF16
    # The user asked for half, which autocast must not change.
    explicit = rewrite(lambda x: fn(x, jnp.float16), X)
    assert floats(eqns(explicit, "dot_general")[0]) == {F32, F16}


# --- The user's own lists, and errors.


def _rotate(x):
    return jnp.roll(x, 1, 0), jnp.int32(1)


rotate_p = Primitive("rotate")
rotate_p.multiple_results = True
rotate_p.def_impl(_rotate)
rotate_p.def_abstract_eval(lambda x: (x, jax.core.ShapedArray((), jnp.int32)))
mlir.register_lowering(rotate_p, mlir.lower_fun(_rotate, multiple_results=True))


def rotated(x):
    y, num = rotate_p.bind(x + 1)
    return jnp.exp(y) * num, num


@pytest.mark.parametrize("policy", POLICIES)
def test_a_users_primitive_in_half(policy):
    plain = rewrite(rotated, X, policy=policy)
    assert floats(eqns(plain, "rotate")[0]) == {F32}
    closed = rewrite(rotated, X, policy=policy, low=["rotate"])
    (eqn,) = eqns(closed, "rotate")
    assert [dtype_of(v) for v in (*eqn.invars, *eqn.outvars)] == [
        POLICIES[policy],
        POLICIES[policy],
        np.int32,
    ]
    assert outputs(closed, "exp") == [F32]
    for got, expected in zip(
        autocast(rotated, policy, low=("rotate",))(X), rotated(X), strict=True
    ):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_primitive_that_the_user_wants_in_float32():
    fn = lambda x: jnp.tanh(x @ W) @ W
    assert outputs(rewrite(fn, X), "tanh") == [BF16]
    assert outputs(rewrite(fn, X, high={"tanh"}), "tanh") == [F32]
    assert_dots(rewrite(fn, X, high={"dot_general"}), F32, 2)


def test_a_call_that_the_user_wants_in_float32_is_left_alone():
    step = lambda c, _: (c @ W, None)
    fn = lambda x: lax.scan(step, x @ W, None, length=2)[0]
    assert_dots(rewrite(fn, X), BF16, 2)
    dots = eqns(rewrite(fn, X, high=["scan"]), "dot_general")
    assert [floats(e) for e in dots] == [{BF16}, {F32}]


def test_errors_of_the_lists():
    with pytest.raises(TypeError, match=r"low='tanh' .*\['tanh'\]"):
        autocast(jnp.tanh, low="tanh")
    with pytest.raises(TypeError, match=r"high='exp'"):
        autocast(jnp.tanh, high="exp")
    with pytest.raises(ValueError, match=r"erf, tanh: in both low= and high="):
        autocast(jnp.tanh, low=["tanh", "erf"], high=["erf", "exp", "tanh"])
    for call in ("scan", "while", "jit", "cond", "custom_vjp_call"):
        with pytest.raises(ValueError, match=f"{call}.* inside it"):
            autocast(jnp.tanh, low=[call])


def test_errors_of_the_policy():
    with pytest.raises(
        ValueError, match=r"'mixed_bf16'.*mixed_bfloat16.*mixed_float16"
    ):
        autocast(jnp.tanh, "mixed_bf16")
    for policy in ("float64", "p=f32,c=f64,o=f32"):
        with pytest.raises(ValueError, match=r"float64.*x64"):
            autocast(jnp.tanh, policy)
    rules = mpjax.PolicyRules([("head", "float64")], default="mixed_bfloat16")
    with pytest.raises(ValueError, match="float64"):
        autocast(jnp.tanh, rules)


def test_the_float32_policy_is_the_identity():
    fn = jax.value_and_grad(lambda x: jnp.sum(jax.nn.gelu(x @ W) * 0.1) ** 2)
    (plain,) = jax.make_jaxpr(jax.jit(fn))(X).eqns
    inside = body(rewrite(fn, X, policy="float32"))
    assert str(inside) == str(open_jaxpr(plain.params["jaxpr"]))
    for got, expected in zip(
        jax.tree.leaves(autocast(fn, "float32")(FINE)),
        jax.tree.leaves(jax.jit(fn)(FINE)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


def two_halves(x):
    with jax.named_scope("first"):
        a = x @ W
    with jax.named_scope("second"):
        b = x @ (W + 1)
    return (a + b) @ W


def test_bfloat16_and_float16_meet_in_float32():
    rules = mpjax.PolicyRules([("second", "mixed_float16")], default="mixed_bfloat16")
    closed = rewrite(two_halves, X, policy=rules)
    dots = [floats(e) for e in eqns(closed, "dot_general")]
    assert dots == [{BF16}, {F16}, {BF16}]
    assert {dtype_of(v) for v in eqns(closed, "add")[-1].invars} == {F32}
    assert eqns(closed, "add")[-1].outvars[0].aval.dtype == F32
    kept = mpjax.PolicyRules([("second", "float32")], default="mixed_float16")
    dots = [floats(e) for e in eqns(rewrite(two_halves, X, policy=kept), "dot_general")]
    assert dots == [{F16}, {F32}, {F16}]
