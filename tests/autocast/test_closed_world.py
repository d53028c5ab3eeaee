"""Without a float32 matmul all is bitwise unchanged; otherwise types are."""

import dataclasses
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.functions import (
    AFTER_A_MATMUL,
    CALLS,
    IDS,
    KEY,
    MADE_ANEW,
    MATMULS,
    OPS,
    WITHOUT_MATMUL,
    W,
    X,
    case,
    types,
)
from helpers.primitive_probes import BF16, F32, POLICIES, eqns, floats, rewrite
from helpers.tools import thinned
from jax import lax, nn
from jax.experimental import io_callback

from mpjax import autocast
from mpjax._jaxpr.core import check_jaxpr, open_jaxpr

MATMUL_NAMES = ("dot_general", "conv_general_dilated", "ragged_dot_general")
ON_DEVICE = jnp.asarray(W)
EMPTY = np.zeros((0, 8), np.float32)


class Pair(NamedTuple):
    """A pytree class defined here."""

    first: Any
    second: Any


@partial(jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=["mode"])
@dataclasses.dataclass
class Tagged:
    """A pytree class with a static part."""

    x: Any
    mode: str


# Trees, weak types, and values that pass through: each with a matmul.
STRUCTURES = {
    "None": case(lambda x: None, X),
    "nothing": case(lambda: ()),
    "None among others": case(lambda x, n: (None, x @ x, {"n": n}), X, None),
    "nested": case(lambda t: {"b": [t["a"] @ t["a"]], "a": (t,)}, {"a": X}),
    "named tuple": case(lambda t: Pair(t.second, t.first @ X), Pair(X, IDS)),
    "dataclass": case(lambda t: Tagged(t.x @ t.x, t.mode + "!"), Tagged(X, "a")),
    "Partial": case(lambda x: jax.tree_util.Partial(jnp.add, x @ x), X),
    "numbers out": case(lambda x: (x @ x, 3, 2.5, True, 1j), X),
    "numpy numbers out": case(lambda x: (x @ x, np.float32(3), np.int8(2)), X),
    "numbers in": case(lambda x, *n: (x @ x, n), X, 3, 2.5, True, 1j),
    "weak by strong": case(lambda x, s: (s * (x @ x), s + 1, s @ s), X, 2 * W),
    "weak factor": case(lambda x, s: (s * (x @ x), s * s, 2 * s), X, 2.5),
    "weak matmul": case(lambda s: jnp.full((8, 8), s) @ jnp.full((8, 8), s), 2.5),
    "weak and half": case(lambda x, s: (x @ x).astype(BF16) * s, X, 2.5),
    "weak carry": case(
        lambda x: lax.fori_loop(0, 3, lambda i, c: (c[0] * 2, c[1] @ x), (1.0, x)), X
    ),
    "weak branch": case(
        lambda x, s: lax.cond(x[0, 0] > 0, lambda: (s, x @ x), lambda: (s, x)), X, 2.0
    ),
    "weak output of jit": case(lambda x, s: jax.jit(lambda x: (s, x @ x))(x), X, 2),
    "numpy scalar": case(lambda x, s: x @ x * s, X, np.float32(3)),
    "array scalar": case(lambda x, s: x @ x * s, X, np.asarray(3)),
    "scalar out": case(lambda x: jnp.vdot(x, x), X),
    "output twice": case(lambda x: (y := x @ x, y, [y, y.T]), X),
    "input out": case(lambda x: (x, x @ x, x), X),
    "inputs only": case(lambda x, i: (i, x), X, IDS),
    "same input twice": case(lambda x, y: (x @ y, x), ON_DEVICE, ON_DEVICE),
    "input out of jit": case(lambda x: jax.jit(lambda h: (h, h @ h))(x @ x), X),
    "unused input": case(lambda x, y: x @ x, X, W),
    "constants": case(lambda x: (jnp.ones(3), np.arange(2), x @ x), X),
    "constants only": case(lambda: (jnp.ones((2, 2)), ON_DEVICE)),
    "closed over": case(lambda x: (x @ W @ ON_DEVICE, W, ON_DEVICE), X),
    "closed-over integers": case(lambda x: x @ x[IDS] + ON_DEVICE.astype(int), X),
    "keys": case(lambda key, x: (jax.random.split(key), key, x @ x), KEY, X),
    "old keys": case(
        lambda key, x: (jax.random.fold_in(key, 1), x @ x), np.uint32([1, 2]), X
    ),
    "key made inside": case(lambda x: (jax.random.key(0), x @ x), X),
    "no rows": case(lambda x, w: (x @ w, w[:, :0] @ x, nn.softmax(x @ w)), EMPTY, W),
    "no batch": case(lambda x: jnp.einsum("bij,bjk->bik", x, x), X[None][:0]),
    "half beside": case(lambda x, h: (x @ x, h @ h, x @ h), X, jnp.asarray(X, BF16)),
    "integers and bools": case(lambda x, m: (x @ x) * m + (m @ x), X, X > 0),
    "complex beside": case(lambda x: (x @ x, (x + 1j) @ x), X),
    "own products of numbers": case(lambda x: (x @ x * 0.1, 1 / (x @ x + 9)), X),
}
FUNCTIONS = STRUCTURES | MATMULS | CALLS | AFTER_A_MATMUL


def mixed(closed):
    """Returns the dtypes of the matmuls that have more than one."""
    return [d for e in eqns(closed, *MATMUL_NAMES) if len(d := floats(e)) > 1]


def bits(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def assert_same_bits(new, old):
    assert types(new) == types(old)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert bits(a).tobytes() == bits(b).tobytes()


def assert_near(new, old):
    """Asserts that numbers are as near as bfloat16 allows, and all else the same."""
    assert types(new) == types(old)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        a, b = bits(a), bits(b)
        if not jnp.issubdtype(b.dtype, jnp.inexact):
            np.testing.assert_array_equal(a, b)
            continue
        a, b = (y.astype(complex if y.dtype.kind == "c" else float) for y in (a, b))
        finite = np.isfinite(b)
        np.testing.assert_array_equal(a[~finite], b[~finite])
        error = np.linalg.norm(a[finite] - b[finite])
        assert error <= 0.02 * np.linalg.norm(b[finite])


def assert_unchanged(fn, *args):
    """Asserts that the jaxpr of a function under autocast is its jaxpr under jit."""
    (call,) = jax.make_jaxpr(autocast(fn))(*args).eqns
    (new,) = open_jaxpr(call.params["jaxpr"]).eqns
    (old,) = jax.make_jaxpr(jax.jit(fn))(*args).eqns
    # Except for the addresses of functions that were traced twice.
    new, old = (
        re.sub("0x[0-9a-f]+", "", str(eqn.params["jaxpr"])) for eqn in (new, old)
    )
    assert new == old


def test_there_are_functions_enough():
    assert len(FUNCTIONS) >= 60
    assert len(WITHOUT_MATMUL) >= 40


# --- Types, and values.


@pytest.mark.parametrize("name", thinned(FUNCTIONS, 8))
def test_outputs_have_the_types_that_they_had(name):
    fn, args = FUNCTIONS[name]
    assert_near(autocast(fn)(*args), jax.jit(fn)(*args))


@pytest.mark.parametrize("policy", thinned(POLICIES))
@pytest.mark.parametrize("name", thinned(FUNCTIONS, 2))
def test_the_rewrite_is_well_typed(name, policy):
    fn, args = FUNCTIONS[name]
    closed, shapes = jax.make_jaxpr(autocast(fn, policy), return_shape=True)(*args)
    check_jaxpr(open_jaxpr(closed))
    assert types(shapes) == types(jax.eval_shape(fn, *args))
    assert mixed(closed) == mixed(jax.make_jaxpr(fn)(*args))


@pytest.mark.parametrize("name", thinned(MATMULS | CALLS, 2))
def test_all_their_matmuls_are_half(name):
    """Otherwise the tests above would show nothing."""
    fn, args = (MATMULS | CALLS)[name]
    dots = eqns(rewrite(fn, *args), *MATMUL_NAMES)
    dtype = F32 if name == "dot of vectors" else BF16  # a sum
    assert {frozenset(floats(e)) for e in dots} <= {frozenset({dtype})}
    assert len(dots) == len(eqns(jax.make_jaxpr(fn)(*args), *MATMUL_NAMES))
    assert dots or name == "custom_root"


# --- Bitwise equality.


@pytest.mark.parametrize("name", thinned(WITHOUT_MATMUL, 4))
def test_a_function_without_a_matmul_is_unchanged(name):
    fn, args = WITHOUT_MATMUL[name]
    assert_unchanged(fn, *args)
    assert_same_bits(autocast(fn)(*args), jax.jit(fn)(*args))


def convert(args, dtype):
    """Returns the arguments, with their float32 arrays in another dtype."""

    def array(x):
        if getattr(x, "dtype", None) != np.float32:
            return x
        return jnp.asarray(4 * x if dtype == np.int32 else x, dtype)

    return jax.tree.map(array, args)


def assert_exact(name, dtype, *, run):
    fn, args = (MATMULS | CALLS | AFTER_A_MATMUL)[name]
    args = convert(args, dtype)
    if name not in MADE_ANEW:
        assert_unchanged(fn, *args)
    if run or name in MADE_ANEW:
        assert_same_bits(autocast(fn)(*args), jax.jit(fn)(*args))


@pytest.mark.parametrize("name", thinned(MATMULS | CALLS | AFTER_A_MATMUL, 4))
def test_float64_is_unchanged(name):
    with jax.enable_x64(True):
        assert_exact(name, np.float64, run=name not in AFTER_A_MATMUL)


# Attention asks for float32 sums, which a CPU does not have for float16.
ATTENTION = ("attention", "causal")


@pytest.mark.parametrize("policy_dtype", thinned(["bfloat16", "float16"]))
@pytest.mark.parametrize("name", thinned(MATMULS | CALLS | OPS, 4))
def test_explicit_half_is_unchanged(name, policy_dtype):
    if name in ATTENTION and policy_dtype == "float16":
        fn, args = MATMULS[name]
        assert_unchanged(fn, *convert(args, policy_dtype))
        return
    assert_exact(name, policy_dtype, run=name in MATMULS)


# The first three ask for float32; convolutions of integers are computed in float32.
NO_INTEGERS = (*ATTENTION, "preferred type", "convolve", "convolve2d")


@pytest.mark.parametrize(
    "name", thinned([name for name in MATMULS if name not in NO_INTEGERS])
)
def test_integers_are_unchanged(name):
    assert_exact(name, np.int32, run=True)


@pytest.mark.parametrize(
    "name", thinned([name for name in MATMULS if name not in ATTENTION])
)
def test_complex_numbers_are_unchanged(name):
    assert_exact(name, np.complex64, run=True)


def test_the_sign_of_a_value_that_flushes_to_zero_in_half_is_kept():
    """A sign must not be taken after rounding: that of 1e-9 is not that of 0."""
    x = np.where(X > 0, 1e-9, -1e-9).astype(np.float32)
    fn = lambda x: jnp.sign(x) @ W
    for policy in POLICIES:
        np.testing.assert_array_equal(autocast(fn, policy)(x), np.sign(x) @ W)


def test_these_matmuls_exist_in_every_dtype():
    """So that the tests above compare matmuls, and not their absence."""
    for dtype in ("bfloat16", "float16", "int32", "complex64"):
        fn, args = MATMULS["einsum"]
        closed = rewrite(fn, *convert(args, jnp.dtype(dtype)))
        assert [e.outvars[0].aval.dtype for e in eqns(closed, *MATMUL_NAMES)] == [
            dtype
        ] * 2


# --- Arguments and results that are not arrays.


def test_leaves_that_are_no_arrays_go_in_and_out():
    def fn(x, mode, *rest, act=jnp.tanh, options):
        y = act(x @ x) * options["scale"]
        return {"y": y, "mode": mode, "act": act, "rest": rest, "options": options}

    args = (X, "a mode", b"bytes", jnp.float32, None, np.dtype("int8"), object)
    kwargs = {"act": nn.relu, "options": {"scale": 2.0, "names": ["a", "b"]}}
    new, old = autocast(fn)(*args, **kwargs), fn(*args, **kwargs)
    assert jax.tree.structure(new) == jax.tree.structure(old)
    assert new["act"] is nn.relu
    assert (new["mode"], new["rest"]) == (old["mode"], old["rest"])
    assert new["options"]["names"] == ["a", "b"]
    np.testing.assert_allclose(new["y"], old["y"], rtol=0.01)


def test_arguments_by_position_and_by_name():
    def fn(x, /, w, *rest, scale=1.0, **others):
        return x @ w * scale, rest, others

    for args, kwargs in (
        ((X, W), {}),
        ((X,), {"w": W, "scale": 2.0}),
        ((X, W, IDS), {"scale": W, "more": {"k": X}, "even": 3}),
    ):
        assert_near(autocast(fn)(*args, **kwargs), jax.jit(fn)(*args, **kwargs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4", "uint4"])
def test_numpy_arrays_of_any_dtype_are_arguments(dtype):
    """NumPy does not know the kind of these dtypes."""
    x = np.ones((8, 8), jnp.dtype(dtype))
    num_traces = 0

    def fn(x, w):
        nonlocal num_traces
        num_traces += 1
        assert isinstance(x, jax.core.Tracer)
        return x + x, w @ w

    cast = autocast(fn)
    new = cast(x, W), cast(np.zeros_like(x), W)
    assert num_traces == 1
    for a, b in zip(
        new, (jax.jit(fn)(x, W), jax.jit(fn)(np.zeros_like(x), W)), strict=True
    ):
        assert_same_bits(a[0], b[0])
        assert_near(a[1], b[1])


def test_any_callable_will_do():
    class Layer:
        def __call__(self, x):
            return x @ W

        def method(self, x):
            return x @ W

        @staticmethod
        def static(x):
            return x @ W

    layer = Layer()
    partials = partial(jnp.matmul, b=W), jax.tree_util.Partial(jnp.matmul, b=W)
    jitted = jax.jit(layer)
    for fn in (layer, layer.method, Layer.static, *partials, jitted, autocast(layer)):
        np.testing.assert_allclose(autocast(fn)(X), X @ W, rtol=0.01)
        assert_near(autocast(fn)(X), jax.jit(fn)(X))


def test_the_name_and_the_doc_of_a_function_stay():
    def loss_fn(x):
        """A loss."""

    cast = autocast(loss_fn)
    assert (cast.__name__, cast.__doc__) == ("loss_fn", "A loss.")


# --- Side effects.


def test_effects_happen_once_and_in_order():
    seen = []

    def fn(x, w):
        note = lambda y: jax.debug.callback(seen.append, y, ordered=True)
        jax.debug.print("{}", x.sum())
        note((x @ w).sum())
        taken = lambda y: (seen.append(y.sum()), y)[1]
        y = io_callback(taken, jax.ShapeDtypeStruct((8, 8), F32), x @ w, ordered=True)
        loop = lambda c, i: ((note(i), c @ w)[1], None)
        return lax.scan(loop, y, jnp.arange(3))[0]

    def run(fn):
        seen.clear()
        jax.block_until_ready(fn(X, W))
        jax.effects_barrier()
        return [float(y) for y in seen]

    assert run(autocast(fn)) == run(jax.jit(fn))
    assert len(seen) == 5
    effects = [jax.make_jaxpr(f)(X, W).effects for f in (autocast(fn), jax.jit(fn))]
    assert set(map(str, effects[0])) == set(map(str, effects[1]))


def test_effects_of_a_custom_derivative():
    seen = []

    def note(what, y):
        jax.debug.callback(lambda _: seen.append(what), y.sum())
        return y

    noted = jax.custom_vjp(lambda x, w: note("primal", x) @ w)
    noted.defvjp(
        lambda x, w: (note("forward", x) @ w, (x, w)),
        lambda kept, g: (note("backward", g) @ kept[1].T, kept[0].T @ g),
    )
    loss = lambda x: jnp.sum(noted(x, W) ** 2)
    for fn, expected in (
        (autocast(loss), ["primal"]),
        (jax.grad(autocast(loss)), ["forward", "backward"]),
        (autocast(jax.grad(loss)), ["forward", "backward"]),
    ):
        seen.clear()
        jax.block_until_ready(fn(X))
        jax.effects_barrier()
        assert seen == expected
