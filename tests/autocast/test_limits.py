"""The limits of autocast, control flow, and the source lines of equations."""

import dataclasses
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.primitive_probes import (
    BF16,
    EYE,
    F32,
    W,
    X,
    assert_dots,
    by_ops,
    eqns,
    floats,
    integers,
    outputs,
    rewrite,
)
from jax import lax

from mpjax import autocast, autocast_report, full_precision
from mpjax._jaxpr.core import dtype_of, inner_jaxprs, open_jaxpr

# --- The contract of tracing.


def test_a_branch_on_a_traced_value_raises_as_in_jit():
    branching = lambda x: x @ W if x[0, 0] > 0 else x
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(branching)(X)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        autocast(branching)(X)
    # So do numbers, which are arguments as in jax.jit.
    with pytest.raises(jax.errors.ConcretizationTypeError):
        autocast(lambda x, n: x if n > 1 else -x)(X, 3)


@dataclasses.dataclass
class Settings:
    """Compared by value, and not hashable."""

    scale: float


def test_leaves_that_are_no_arrays_are_static():
    def fn(x, mode, *, options):
        y = options["activation"](x @ W) * options["settings"].scale
        return {"y": y if mode == "same" else -y, "mode": mode, "none": None}

    options = {"activation": jax.nn.relu, "settings": Settings(2.0)}
    with pytest.raises(TypeError, match="unhashable"):
        hash(options["settings"])
    cast = autocast(fn)
    expected = 2 * np.maximum(X @ W, 0)
    for mode, sign in (("same", 1), ("other", -1), ("same", 1)):
        result = cast(X, mode, options=options)
        assert (result["mode"], result["none"]) == (mode, None)
        np.testing.assert_array_equal(result["y"], sign * expected)


def test_a_static_leaf_changed_in_place_is_seen():
    settings = Settings(1.0)
    cast = autocast(lambda x, settings: x * settings.scale)
    np.testing.assert_array_equal(cast(X, settings), X)
    settings.scale = 2.0
    np.testing.assert_array_equal(cast(X, settings), 2 * X)


def counted(fn):
    def counting(*args):
        counting.num_traces += 1
        return fn(*args)

    counting.num_traces = 0
    return counting


@pytest.mark.parametrize("wrap", [autocast, full_precision])
def test_eager_calls_trace_once_per_shape(wrap):
    fn = counted(lambda x, mode: jnp.tanh(x @ W))
    cast = wrap(fn)
    for _ in range(5):
        cast(X, Settings(1.0))
    assert fn.num_traces == 1
    for _ in range(5):
        cast(X[:3], Settings(1.0))
    cast(X, Settings(1.0))
    assert fn.num_traces == 2
    cast(X, Settings(2.0))
    assert fn.num_traces == 3


def test_eager_gradients_trace_once():
    fn = counted(lambda x: jnp.tanh(x @ W).sum())
    for grad in (jax.grad(autocast(fn)), autocast(jax.grad(fn))):
        fn.num_traces = 0
        for _ in range(5):
            grad(X)
        assert fn.num_traces == 1


# --- Sentinels, casts without effect, and primitives that are not understood.


@pytest.mark.slow
def test_a_sentinel_through_a_matmul_needs_full_precision():
    x, w = integers(2, 2, 20, 8, high=3), integers(3, 8, 12, high=3)
    labels = np.random.default_rng(0).integers(1, 12, (2, 5))

    def loss(ctc_loss, x):
        logits = x @ w / 3
        none = jnp.zeros(logits.shape[:2])
        return ctc_loss(logits, none, labels, jnp.zeros(labels.shape))

    plain = lambda x: loss(optax.ctc_loss, x)
    guarded = lambda x: loss(full_precision(optax.ctc_loss), x)
    truth = np.asarray(plain(x))

    def error(fn):
        (value,) = by_ops(rewrite(fn, x), x)
        return np.abs(np.asarray(value) - truth).max()

    assert error(plain) > 1e-3
    assert error(guarded) * 10 < error(plain)


def test_full_precision_has_no_half_inside():
    inner = full_precision(lambda h: jnp.tanh(h @ W) @ W)
    closed = rewrite(lambda x: inner(x @ W) @ W, X)
    dots = eqns(closed, "dot_general")
    assert [floats(e) for e in dots] == [{BF16}, {F32}, {F32}, {BF16}]
    assert outputs(closed, "tanh") == [F32]
    np.testing.assert_array_equal(inner(X), jax.jit(lambda h: jnp.tanh(h @ W) @ W)(X))


def test_a_cast_to_float32_of_float32_is_invisible():
    with_cast = rewrite(lambda x: (x @ W).astype(jnp.float32) @ W, X)
    assert str(with_cast) == str(rewrite(lambda x: (x @ W) @ W, X))
    assert_dots(with_cast, BF16, 2)


FINE = (1 + integers(5, 8, 8) / 1e4).astype(np.float32)

UNKNOWN = {
    "composite": lambda x: lax.composite(lambda x: x @ FINE, "my.matmul")(x),
    "custom_linear_solve": lambda x: lax.custom_linear_solve(
        lambda y: FINE @ y + 9 * y, x, lambda _, b: b @ FINE, symmetric=True
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_primitive_with_a_function_runs_as_traced(name):
    fn = UNKNOWN[name]
    closed = rewrite(lambda x: fn(x) @ W, FINE)
    (eqn,) = eqns(closed, name)
    dots = [e for sub in inner_jaxprs(eqn) for e in eqns(sub, "dot_general")]
    assert dots
    assert [floats(e) for e in dots] == [{F32}] * len(dots)
    assert floats(eqns(closed, "dot_general")[-1]) == {BF16}
    np.testing.assert_array_equal(autocast(fn)(FINE), jax.jit(fn)(FINE))
    # It takes float32 where it would be given half.
    (eqn,) = eqns(rewrite(lambda x: fn(x @ W), FINE), name)
    assert floats(eqn) == {F32}
    # Linear algebra is so on purpose; of anything else the report says so.
    listed = autocast_report(fn)(FINE).not_understood()
    assert [r.primitive for r in listed] == ([name] if name == "composite" else [])


def layer_norm(h):
    mean, variance = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
    return (h - mean) * lax.rsqrt(variance + 1e-5)


def test_a_norm_stays_in_float32():
    """It takes more memory than by hand: half goes in and out, float32 is inside."""
    closed = rewrite(lambda x: layer_norm(x @ W) @ W, X)
    assert_dots(closed, BF16, 2)
    names = "reduce_sum", "sub", "mul", "div", "rsqrt", "add", "square", "integer_pow"
    assert set(outputs(closed, *names)) == {F32}


def test_relu_of_float32_is_float32():
    kept = rewrite(lambda x: (y := jax.nn.relu(x), y @ W), X)
    assert outputs(kept, "max") == [F32]
    full = rewrite(lambda x: jnp.exp(jax.nn.relu(x @ W)).sum(), X)
    assert dtype_of(eqns(full, "exp")[0].invars[0]) == F32


# --- Layout.


@pytest.mark.parametrize(
    "loss",
    [
        lambda w: jnp.sum((X @ w) ** 2),
        lambda w: jnp.sum(jnp.einsum("btd,df->btf", X.reshape(2, 4, 8), w) ** 2),
        lambda w: jnp.sum(
            jnp.einsum("bhtk,bhks->bhts", X.reshape(2, 2, 4, 4), w.reshape(2, 2, 4, 4))
            ** 2
        ),
    ],
)
def test_no_transpose_is_left_behind_a_weights_gradient(loss):
    grad = jax.grad(loss)
    traced = jax.make_jaxpr(grad)(W)
    closed = rewrite(grad, W)
    assert len(eqns(closed, "dot_general")) == len(eqns(traced, "dot_general"))
    behind_dots = {e.outvars[0] for e in eqns(traced, "dot_general")}
    assert any(e.invars[0] in behind_dots for e in eqns(traced, "transpose"))
    behind_dots = {e.outvars[0] for e in eqns(closed, "dot_general")}
    assert not any(e.invars[0] in behind_dots for e in eqns(closed, "transpose"))
    np.testing.assert_allclose(by_ops(closed, W)[0], grad(W), rtol=0.02, atol=2)


def test_a_matmul_that_is_used_twice_is_not_turned():
    fn = lambda x: (y := x @ W, y.T)
    closed = rewrite(fn, X)
    assert len(eqns(closed, "dot_general")) == len(eqns(closed, "transpose")) == 1
    for got, expected in zip(by_ops(closed, X), (X @ W, (X @ W).T), strict=True):
        np.testing.assert_array_equal(got, expected)
    # Nor is one whose transpose exchanges more than the operands' axes.
    batched = lambda x: jnp.einsum("bij,bjk->bik", x, x).transpose(2, 0, 1)
    closed = rewrite(batched, X.reshape(4, 4, 4))
    assert outputs(closed, "transpose") == [BF16]


def test_a_barrier_keeps_the_dtype_of_each_operand():
    fn = lambda x: lax.optimization_barrier((x @ W, x, jnp.int32(3)))
    closed = rewrite(lambda x: fn(x)[0] @ EYE + fn(x)[1], X)
    for eqn in eqns(closed, "optimization_barrier"):
        assert [dtype_of(v) for v in eqn.invars] == [BF16, F32, np.int32]
        assert [dtype_of(v) for v in eqn.outvars] == [BF16, F32, np.int32]
    np.testing.assert_array_equal(autocast(fn)(X)[0], X @ W)


# --- Control flow.


def boundary(eqn):
    """Returns the dtypes in and out of an equation, and of each function inside it."""
    yield from (eqn.invars, eqn.outvars)
    for sub in inner_jaxprs(eqn):
        yield from (open_jaxpr(sub).invars, open_jaxpr(sub).outvars)


def assert_close(fn, *args):
    new, old = jax.tree.leaves(autocast(fn)(*args)), jax.tree.leaves(fn(*args))
    for a, b in zip(new, old, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=0.03, atol=0.03)


def scanned(x):
    def inner(c, w):
        return jnp.tanh(c @ w), c.sum()

    def outer(c, ws):
        return lax.scan(inner, c, ws)

    return lax.scan(
        outer, x @ W / 8, np.stack([W, W.T, -W, W]).reshape(2, 2, 8, 8) / 32
    )


def looped(x):
    body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ W / 32))
    return lax.while_loop(lambda c: c[0] < 3, body, (0, x @ W / 8))


def branched(x):
    branches = [lambda h: h @ W, jnp.sin, lambda h: jax.nn.relu(h) @ W, lambda h: -h]
    return [lax.switch(i, branches, x @ W / 64) for i in jnp.arange(4)]


@pytest.mark.parametrize(
    ("fn", "loop", "num_dots"), [(scanned, "scan", 2), (looped, "while", 2)]
)
def test_the_carry_of_a_loop_is_float32(fn, loop, num_dots):
    closed = rewrite(fn, X)
    assert_dots(closed, BF16, num_dots)
    loops = eqns(closed, loop)
    assert len(loops) == len(eqns(jax.make_jaxpr(fn)(X), loop))
    for eqn in loops:
        for atoms in boundary(eqn):
            assert {dtype_of(v) for v in atoms} <= {
                F32,
                np.dtype(np.int32),
                np.dtype(bool),
            }
    assert outputs(closed, "tanh")[-1] == F32
    assert_close(fn, X)


@pytest.mark.parametrize(
    "fn", [scanned, pytest.param(branched, marks=pytest.mark.slow)]
)
def test_gradients_through_control_flow(fn):
    loss = lambda x: sum(jnp.mean(y**2) for y in jax.tree.leaves(fn(x)))
    for grad in (autocast(jax.grad(loss)), jax.grad(autocast(loss))):
        closed = jax.make_jaxpr(grad)(X)
        dots = eqns(closed, "dot_general")
        assert len(dots) == len(eqns(jax.make_jaxpr(jax.grad(loss))(X), "dot_general"))
        assert {frozenset(floats(e)) for e in dots} == {frozenset({BF16})}
        got, expected = np.asarray(grad(X)), np.asarray(jax.grad(loss)(X))
        assert got.dtype == F32
        norm = np.linalg.norm
        assert norm(got - expected) < 0.05 * norm(expected)


def test_branches_of_different_dtypes_return_float32():
    closed = rewrite(branched, X)
    for eqn in eqns(closed, "cond"):
        assert [dtype_of(v) for v in eqn.invars].count(BF16) == 1
        for sub in inner_jaxprs(eqn):
            assert {dtype_of(v) for v in open_jaxpr(sub).outvars} == {F32}
    assert {frozenset(floats(e)) for e in eqns(closed, "dot_general")} == {
        frozenset({BF16})
    }
    assert_close(branched, X)


# --- Source lines and name scopes.


def two_layers(x, w):
    with jax.named_scope("encoder"):
        h = jnp.tanh(x @ w)  # the encoder's matmul
    with jax.named_scope("decoder"):
        return jnp.sum(h @ w)  # the decoder's matmul


def locations(text, op):
    """Returns the locations of an operation in StableHLO, references resolved."""
    defined = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))

    def resolve(location):
        return re.sub(r"#loc\d*", lambda ref: resolve(defined[ref[0]]), location)

    lines = re.findall(rf"stablehlo\.{op} .*loc\((.*)\)$", text, re.MULTILINE)
    return [resolve(line) for line in lines]


def line_of(scope):
    lines, first = inspect.getsourcelines(two_layers)
    (index,) = [i for i, line in enumerate(lines) if f"the {scope}'s" in line]
    return f'{Path(__file__).name}":{first + index}:'


ORDERS = {
    "forward": lambda fn: autocast(fn),
    "inside the gradient": lambda fn: jax.grad(autocast(fn), (0, 1)),
    "outside": lambda fn: autocast(jax.grad(fn, (0, 1))),
}


@pytest.mark.parametrize("order", ORDERS)
def test_equations_keep_their_source_lines_and_scopes(order):
    lowered = jax.jit(ORDERS[order](two_layers)).lower(X, W)
    text = lowered.as_text(debug_info=True)
    found = []
    for location in locations(text, "dot_general"):
        (scope,) = [scope for scope in ("encoder", "decoder") if scope in location]
        assert line_of(scope) in location
        found.append(scope)
    # The gradient does not use the decoder's output.
    expected = [1, 1] if order == "forward" else [3, 2]
    assert [found.count("encoder"), found.count("decoder")] == expected


@pytest.mark.parametrize("order", ORDERS)
def test_inserted_casts_say_where_they_are_from(order):
    lowered = jax.jit(ORDERS[order](two_layers)).lower(X, W)
    casts = locations(lowered.as_text(debug_info=True), "convert")
    assert len(casts) >= 4
    for location in casts:
        assert any(
            line_of(s) in location and s in location for s in ("encoder", "decoder")
        )
