"""Autocast inside of every transformation of JAX, and around it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.functions import (
    BATCH,
    IDS,
    MASK,
    W,
    X,
    by_gradient,
    matmul_with_own_jvp,
    matmul_with_own_vjp,
    nondiff,
    rows,
    rows_forward,
    symbolic,
    symbolic_forward,
    types,
)
from helpers.primitive_probes import BF16, F16, F32, VERSION, eqns, floats
from helpers.tools import thinned
from jax import NamedSharding, P, lax, nn
from jax.experimental import checkify
from jax.sharding import AxisType

from mpjax import autocast, full_precision
from mpjax._jaxpr.core import check_jaxpr, open_jaxpr
from mpjax._jaxpr.primitives import MATMULS


def layer(x, w):
    return jnp.tanh(x @ w)


def loss_fn(x, w):
    return jnp.sum(nn.softmax(layer(x, w) @ w) ** 2)


def dots(fn, *args):
    """Returns the dtype of each matmul, which must have only one."""
    closed = jax.make_jaxpr(fn)(*args)
    check_jaxpr(open_jaxpr(closed))
    found = [floats(e) for e in eqns(closed, *MATMULS)]
    assert all(len(dtypes) == 1 for dtypes in found)
    return [dtype for (dtype,) in found]


def assert_near(new, old, tolerance=0.02):
    assert types(new) == types(old)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        a, b = np.float64(a), np.float64(b)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def assert_transformed(new, old, *args):
    """Asserts that every matmul is half, and types and values as without autocast."""
    assert_near(new(*args), old(*args))
    found = dots(new, *args)
    expected = len(eqns(jax.make_jaxpr(old)(*args), *MATMULS))
    assert found == [BF16] * expected


# --- One transformation at a time: a function of a function, with its arguments.

SAVE_DOTS = jax.checkpoint_policies.dots_saveable
forward = lambda f: lambda x, w: jax.jvp(f, (x, w), (w, x))
scanned = lambda f: lambda x, w: lax.scan(lambda c, _: (f(c, w), None), x, None, 3)[0]


def looped(f):
    def fn(x, w):
        more, step = lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1], w))
        return lax.while_loop(more, step, (0, x))

    return fn


TRANSFORMS = {
    "jit": (jax.jit, layer, (X, W)),
    "vmap": (lambda f: jax.vmap(f, (0, None)), layer, (BATCH, W)),
    "vmap of the last axis": (lambda f: jax.vmap(f, (2, None), 1), layer, (BATCH, W)),
    "vmap of both": (jax.vmap, layer, (BATCH, BATCH)),
    "grad": (jax.grad, loss_fn, (X, W)),
    "value_and_grad": (lambda f: jax.value_and_grad(f, (0, 1)), loss_fn, (X, W)),
    "grad of jit": (lambda f: jax.grad(jax.jit(f)), loss_fn, (X, W)),
    "jvp": (forward, layer, (X, W)),
    "linearize": (
        lambda f: lambda x, w: jax.linearize(f, x, w)[1](w, x),
        layer,
        (X, W),
    ),
    "vjp": (lambda f: lambda x, w: jax.vjp(f, x, w)[1](x), layer, (X, W)),
    "checkpoint": (lambda f: jax.grad(jax.checkpoint(f)), loss_fn, (X, W)),
    "checkpoint of dots": (
        lambda f: jax.grad(jax.checkpoint(f, policy=SAVE_DOTS)),
        loss_fn,
        (X, W),
    ),
    "scan": (scanned, layer, (X, W)),
    "while": (looped, layer, (X, W)),
    "cond": (
        lambda f: lambda x, w: lax.cond(x[0, 0] < 9, f, lambda x, w: x, x, w),
        layer,
        (X, W),
    ),
    "linear_transpose": (
        lambda f: lambda x, w: jax.linear_transpose(lambda x: f(x, w), x)(x),
        jnp.matmul,
        (X, W),
    ),
    "vmap of grad": (lambda f: jax.vmap(jax.grad(f), (0, None)), loss_fn, (BATCH, W)),
    "jacfwd": (jax.jacfwd, layer, (X[0], W)),
    "jacrev": (jax.jacrev, layer, (X[0], W)),
    "hessian": (jax.hessian, loss_fn, (X[:2], W)),
    "grad of grad": (
        lambda f: jax.grad(lambda x, w: jnp.sum(jax.grad(f)(x, w) * w)),
        loss_fn,
        (X, W),
    ),
    "jvp of grad": (lambda f: forward(jax.grad(f)), loss_fn, (X, W)),
    "grad of jvp": (
        lambda f: jax.grad(lambda x, w: forward(f)(x, w)[1]),
        loss_fn,
        (X, W),
    ),
    "grad of scan": (
        lambda f: jax.grad(lambda x, w: jnp.sum(scanned(f)(x, w) ** 2), (0, 1)),
        layer,
        (X, W),
    ),
}


@pytest.mark.parametrize("order", ["inside", "outside"])
@pytest.mark.parametrize("name", thinned(TRANSFORMS, 6))
def test_transformations(name, order):
    transform, fn, args = TRANSFORMS[name]
    new = transform(autocast(fn)) if order == "inside" else autocast(transform(fn))
    assert_transformed(new, transform(fn), *args)


def test_gradients_of_gradients_around_each_other():
    second = lambda grad: lambda x, w: jnp.sum(grad(x, w) * w)
    new = jax.grad(second(autocast(jax.grad(loss_fn))))
    assert_transformed(new, jax.grad(second(jax.grad(loss_fn))), X, W)


def test_traced_but_not_run():
    closed, shapes = jax.make_jaxpr(autocast(layer), return_shape=True)(X, W)
    assert closed.out_avals[0].dtype == F32
    struct = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for found in (shapes, jax.eval_shape(autocast(layer), struct, struct)):
        assert types(found) == types(jax.eval_shape(layer, X, W))
    compiled = jax.jit(autocast(layer)).lower(struct, struct).compile()
    assert_near(compiled(X, W), layer(X, W))


def test_what_vjp_and_linearize_return_goes_out_and_in():
    for make in (jax.vjp, jax.linearize):
        y, new = autocast(lambda x, make=make: make(lambda x: layer(x, W), x))(X)
        expected, old = make(lambda x: layer(x, W), X)
        assert_near(y, expected)
        assert_near(new(X), old(X))
        assert_near(autocast(new)(X), old(X))


# --- Devices.


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("i",), axis_types=(kind,))


def mean_layer(x, w):
    h = lax.cond(x[0, 0] < 9, lambda h: h, lambda h: -h, x @ w)
    return h - lax.pmean(h, "i"), lax.psum(jnp.sum(layer(x, w)), "i")


@pytest.mark.parametrize("order", ["inside", "outside"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, order):
    specs = {"in_specs": (P("i"), P()), "out_specs": (P("i"), P())}
    shard = partial(jax.shard_map, mesh=mesh(), check_vma=check_vma, **specs)
    new = shard(autocast(mean_layer))
    new = new if order == "inside" else autocast(shard(mean_layer))
    old = jax.jit(shard(mean_layer))
    x = np.concatenate([X, X[::-1]])
    assert_transformed(jax.jit(new), old, x, W)
    grad = lambda fn: jax.jit(jax.grad(lambda x, w: fn(x, w)[1], (0, 1)))
    assert_transformed(grad(new), grad(old), x, W)
    (call,) = eqns(jax.make_jaxpr(new)(x, W), "shard_map")
    assert call.params["check_vma"] is check_vma


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_collectives_in_a_named_vmap_and_pmap(order):
    def fn(x, w):
        return lax.pmean(layer(x, w), "i")

    xs = np.stack([X] * 8)
    for transform in (jax.vmap, jax.pmap):
        over = partial(transform, in_axes=(0, None), axis_name="i")
        new = over(autocast(fn)) if order == "inside" else autocast(over(fn))
        assert_transformed(new, over(fn), xs, W)


@pytest.mark.skipif(VERSION < (0, 10, 2), reason="jax cannot derive such a matmul")
def test_explicit_sharding():
    with jax.set_mesh(mesh(AxisType.Explicit)):
        x = jax.device_put(X, NamedSharding(jax.sharding.get_mesh(), P("i", None)))
        grad = partial(jax.value_and_grad, argnums=(0, 1))
        for new in (autocast(grad(loss_fn)), grad(autocast(loss_fn))):
            new, old = jax.jit(new), jax.jit(grad(loss_fn))
            assert_transformed(new, old, x, W)
            shardings = lambda fn: [jax.typeof(y) for y in jax.tree.leaves(fn(x, W))]
            assert shardings(new) == shardings(old)


# --- Functions with custom derivatives.


CUSTOM = {
    "custom_jvp": matmul_with_own_jvp,
    "custom_vjp": matmul_with_own_vjp,
    "arguments that are static": lambda x, w: nondiff(jnp.sin, x, w, 3),
    "integers": lambda x, w: rows(x, w, IDS)[0],
    "integers, forward": lambda x, w: rows_forward(x, w, IDS)[0],
    "symbolic zeros": lambda x, w: symbolic(x, w)[0],
    "symbolic zeros, forward": symbolic_forward,
    "custom_gradient": by_gradient,
    "in scan": scanned(lambda x, w: jnp.sin(matmul_with_own_vjp(x, w))),
    "in checkpoint": jax.checkpoint(lambda x, w: jnp.sin(matmul_with_own_vjp(x, w))),
    "in vmap": lambda x, w: jax.vmap(matmul_with_own_vjp, (0, None))(BATCH * x, w),
    "in each other": jax.custom_jvp(matmul_with_own_vjp),
}
CUSTOM["in each other"].defjvps(
    lambda dx, _, x, w: matmul_with_own_jvp(dx, w), lambda dw, _, x, w: x @ dw
)


@pytest.mark.parametrize("order", ["inside", "outside"])
@pytest.mark.parametrize("name", thinned(CUSTOM, 6))
def test_custom_derivatives(name, order):
    loss = lambda x, w: jnp.sum(nn.softmax(CUSTOM[name](x, w)) ** 2)
    for grad in (jax.grad, partial(jax.grad, argnums=(0, 1))):
        new = grad(autocast(loss)) if order == "inside" else autocast(grad(loss))
        assert_near(new(X, W), grad(loss)(X, W))
        found = dots(new, X, W)
        assert set(found) == {BF16}
        assert len(found) >= len(eqns(jax.make_jaxpr(grad(loss))(X, W), *MATMULS))


@pytest.mark.parametrize("name", ["custom_jvp", "custom_vjp"])
def test_second_derivatives_of_custom_derivatives(name):
    loss = lambda x, w: jnp.sum(jnp.tanh(CUSTOM[name](x, w)))
    twice = lambda fn: jax.grad(lambda x, w: jnp.sum(jax.grad(fn)(x, w) * w))
    for new in (twice(autocast(loss)), autocast(twice(loss))):
        assert_near(new(X, W), twice(loss)(X, W))
        assert set(dots(new, X, W)) == {BF16}


def test_a_custom_rule_is_used():
    """The rule gives twice the true gradient."""
    double = jax.custom_vjp(jnp.matmul)
    double.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda kept, g: (2 * g @ kept[1].T, 2 * kept[0].T @ g),
    )
    loss = lambda fn: lambda x: jnp.sum(fn(x, W))
    for new in (jax.grad(autocast(loss(double))), autocast(jax.grad(loss(double)))):
        assert_near(new(X), 2 * jax.grad(loss(jnp.matmul))(X))


# --- Autocast in autocast, and full precision.

FINE = W + np.float32(1e-3)


def gradients(inner):
    """Yields ways to differentiate a loss around `inner` under autocast."""
    loss = lambda x, w: jnp.sum((inner(x, w) @ w) ** 2)
    remat = lambda x, w: jnp.sum((jax.checkpoint(inner)(x, w) @ w) ** 2)
    return {
        "forward": autocast(loss),
        "inside": jax.grad(autocast(loss), (0, 1)),
        "outside": autocast(jax.grad(loss, (0, 1))),
        "checkpoint": autocast(jax.grad(remat, (0, 1))),
        "scan": autocast(
            jax.grad(lambda x, w: jnp.sum((scanned(inner)(x, w) @ w) ** 2), (0, 1))
        ),
        "vmap": lambda x, w: jax.vmap(jax.grad(autocast(loss)), (0, None))(x[None], w),
    }


INNER = {
    "full_precision": (full_precision, F32),
    "float32": (partial(autocast, policy="float32"), F32),
    "mixed_float16": (partial(autocast, policy="mixed_float16"), F16),
}
# Matmuls of the inner function, and of the loss around it.
NUM_DOTS = {
    "forward": (1, 1),
    "inside": (3, 3),
    "outside": (3, 3),
    "checkpoint": (4, 3),
    "scan": (3, 3),
    "vmap": (2, 2),
}


@pytest.mark.parametrize("way", NUM_DOTS)
@pytest.mark.parametrize("kind", thinned(INNER, 4))
def test_the_inner_autocast_wins(kind, way):
    wrap, dtype = INNER[kind]
    new = gradients(wrap(layer))[way]
    found = dots(new, X, FINE)
    assert (found.count(dtype), found.count(BF16)) == NUM_DOTS[way]
    assert len(found) == sum(NUM_DOTS[way])
    old = gradients(full_precision(layer))[way]
    assert_near(new(X, FINE), old(X, FINE))


@pytest.mark.parametrize("kind", ["full_precision", "float32"])
@pytest.mark.parametrize("disabled", [False, True])
def test_the_inner_autocast_wins_bitwise(kind, disabled):
    """It does so without jit, too."""
    inner = INNER[kind][0](jnp.matmul)
    outer = autocast(lambda x, w: (inner(x, w), x @ w))
    with jax.disable_jit(disabled):
        exact, half = outer(X, FINE)
    np.testing.assert_allclose(exact, X @ FINE, rtol=1e-6, atol=1e-6)
    assert np.abs(half - X @ FINE).max() > 1e-4


# --- Modes and effects.


def test_x64():
    def fn(x, w, number):
        h = x @ w
        return h * number, h.astype(np.float64) + 0.1, jnp.sum(h, dtype=float), number

    with jax.enable_x64(True):
        assert_transformed(autocast(fn), jax.jit(fn), X, W, 2.5)
        grad = partial(jax.grad, argnums=(0, 1))
        loss = lambda x, w: jnp.sum(fn(x, w, 2.5)[1])
        for new in (autocast(grad(loss)), grad(autocast(loss))):
            assert_transformed(new, grad(loss), X, W)


ONES_OWN = list(CUSTOM.values())[:2]
CHECKS = {
    "leaks": jax.checking_leaks,
    "nans": lambda: jax.debug_nans(True),
    "no jit": jax.disable_jit,
    "jaxprs": lambda: jax.enable_checks(True),
    "strict types": lambda: jax.numpy_dtype_promotion("strict"),
    "strict ranks": lambda: jax.numpy_rank_promotion("raise"),
}


@pytest.mark.parametrize("fn", thinned([layer, scanned(layer), *ONES_OWN], 4))
@pytest.mark.parametrize("mode", thinned(CHECKS))
def test_modes_that_check(mode, fn):
    loss = lambda x, w: jnp.sum(fn(x, w) ** 2)
    old = jax.grad(loss)(X, W), jax.vmap(jax.grad(loss), (0, None))(BATCH, W)
    with CHECKS[mode]():
        for new in (autocast(jax.grad(loss)), jax.grad(autocast(loss))):
            assert_near(new(X, W), old[0])
            assert_near(jax.vmap(new, (0, None))(BATCH, W), old[1])


def test_nans_are_found_and_an_infinite_mask_is_none():
    masked = autocast(lambda x: nn.softmax(jnp.where(MASK, x @ x, -jnp.inf)))
    with jax.debug_nans(True):
        assert np.isfinite(masked(X)).all()
        with pytest.raises(FloatingPointError, match="nan"):
            autocast(lambda x: jnp.log(x @ x - 100))(X)


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_checkify(order):
    def fn(x, w):
        h = x @ w
        checkify.check(h.max() < 0.5, "too large: {}", h.max())
        return scanned(lambda c, w: jnp.log(c @ w - 1e3))(h, w)

    for errors in (checkify.user_checks, checkify.float_checks):
        check = partial(checkify.checkify, errors=errors)
        new = check(autocast(fn)) if order == "inside" else autocast(check(fn))
        for args in ((X, W), (0 * X, W)):
            (error, _), (expected, _) = new(*args), jax.jit(check(fn))(*args)
            assert error.get() == expected.get()
            is_fine = errors is checkify.user_checks and not args[0].any()
            assert (error.get() is None) == is_fine
