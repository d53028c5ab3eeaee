"""Random programs: every program that traces also autocasts, with the same types.

A program is a list of steps on a pool of (4, 4) arrays, each of which adds its result.
A step is the name of an operation, which of the last results it takes, and, if the
operation calls a function, the program of that function.
"""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from helpers.functions import types
from helpers.primitive_probes import POLICIES, eqns, floats
from jax import lax, nn
from jax.ad_checkpoint import checkpoint_name

from mpjax import autocast
from mpjax._jaxpr.core import check_jaxpr, open_jaxpr

N = 4
NUM_EXAMPLES = hypothesis.settings().max_examples
rng = np.random.default_rng(0)
X, W = rng.uniform(-1, 1, (2, N, N)).astype(np.float32)
HALVES = [jnp.asarray(X.T, jnp.bfloat16), jnp.asarray(W.T, jnp.float16)]
IDS = np.array([2, 0, 3, 2], np.int32)
MASK = np.tril(np.ones((N, N), bool))
# The programs' arguments: two matrices to differentiate for, halves, integers, a mask,
# a number, and a boolean that chooses a branch.
ARGS = (X, W, *HALVES, IDS * MASK, MASK, 0.3, np.int32(1))
MATMUL_NAMES = ("dot_general", "conv_general_dilated")

# --- Operations. Their values stay in about [-1, 1], and errors grow little.

ONE = {
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "sigmoid": nn.sigmoid,
    "relu": nn.relu,
    "gelu": nn.gelu,
    "softmax": nn.softmax,
    "masked softmax": lambda a: nn.softmax(jnp.where(MASK, a, -jnp.inf)),
    "logsumexp": lambda a: a * 0 + nn.logsumexp(a, -1, keepdims=True) / 4,
    "exp": lambda a: jnp.exp(-abs(a)),
    "log": lambda a: jnp.log1p(abs(a)),
    "root": lambda a: jnp.sqrt(abs(a) + 1) / 2,
    "square": lambda a: jnp.clip(a, -1, 1) ** 2,
    "negative": lambda a: -a,
    "absolute": abs,
    "scaled": lambda a: a * 0.3,
    "halved": lambda a: a / 2,
    "with epsilon": lambda a: a / (abs(a).max() + 1 + 1e-12),
    "transpose": lambda a: a.T,
    "reshape": lambda a: a.reshape(2, 8)[::-1].reshape(N, N),
    "mean": lambda a: jnp.broadcast_to(a.mean(0), a.shape),
    "sum": lambda a: jnp.sum(a, 1, keepdims=True) / 4 + 0 * a,
    "maximum of rows": lambda a: jnp.broadcast_to(a.max(0), a.shape),
    "cumsum": lambda a: a.cumsum(1) / 4,
    "cummax": lambda a: lax.cummax(a),
    "sort": lambda a: jnp.sort(a, axis=0),
    "gather": lambda a: a[IDS],
    "scatter": lambda a: a.at[IDS].add(a) / 3,
    "roll": lambda a: jnp.roll(a, 1, 0),
    "pad": lambda a: jnp.pad(a[1:, :-1], ((0, 1), (1, 0)), constant_values=0.1),
    "one_hot": lambda a: nn.one_hot(IDS, N, dtype=a.dtype) @ a,
    "diagonal": lambda a: jnp.diag(jnp.diag(a)),
    "name": lambda a: checkpoint_name(a, "a"),
    "barrier": lambda a: lax.optimization_barrier((a, IDS))[0],
    "stop_gradient": lax.stop_gradient,
    "reduce_precision": lambda a: lax.reduce_precision(a, 8, 6),
    "float32": lambda a: a.astype(jnp.float32),
    "bfloat16": lambda a: a.astype(jnp.bfloat16),
    "float16": lambda a: a.astype(jnp.float16),
}


def matmul(a, b):
    dtype = jnp.promote_types(a.dtype, b.dtype)
    return a.astype(dtype) @ b.astype(dtype) / 4


def convolution(a, b):
    dtype = jnp.promote_types(a.dtype, b.dtype)
    a, b = a.astype(dtype)[None], b.astype(dtype)[:, :, None]
    return lax.conv_general_dilated(a, b, (1,), "SAME")[0] / 4


TWO = {
    "matmul": matmul,
    "matmul, transposed": lambda a, b: matmul(a, b.T),
    "matmul, both sides": lambda a, b: matmul(a.T, b).T,
    "batched matmul": lambda a, b: matmul(a.reshape(2, 2, N), b).reshape(N, N),
    "outer product": lambda a, b: matmul(a[:, :1], b[:1]),
    "vectors": lambda a, b: a * 0 + matmul(a[0], b[1]),
    "convolution": convolution,
    "add": lambda a, b: (a + b) / 2,
    "subtract": lambda a, b: (a - b) * 0.5,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / (2 + abs(b)),
    "maximum": jnp.maximum,
    "where": lambda a, b: jnp.where(MASK, a, b),
    "masked": lambda a, b: jnp.where(MASK, a, 0) + jnp.where(MASK, 0, b),
    "concatenate": lambda a, b: jnp.concatenate([a, b])[2:6],
    "update": lambda a, b: lax.dynamic_update_slice(a, b[:2].astype(a.dtype), (1, 0)),
}
# Operations in which a last bit changes much: for types only.
ROUGH = {
    "less": lambda a, b: a < b,
    "to integers": lambda a, b: (4 * a).astype(jnp.int32),
    "round": lambda a, b: jnp.round(a + b),
    "argsort": lambda a, b: jnp.argsort(a),
    "top_k": lambda a, b: jnp.concatenate(lax.top_k(a, 2), 1),
    "argmax": lambda a, b: nn.one_hot(a.argmax(0), N) + b,
    "choose": lambda a, b: jnp.where(a > b, a, b * 0.1),
    "complex": lambda a, b: abs(a + 1j * b),
    "sign": lambda a, b: jnp.sign(a) + b,
}

# --- Calls, of a function of two arrays.


def with_jvp(fn, a, b):
    wrapped = jax.custom_jvp(fn)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return wrapped(a, b)


def with_vjp(fn, a, b):
    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(lambda *args: jax.vjp(fn, *args), lambda vjp, g: vjp(g))
    return wrapped(a, b)


def branch(fn, a, b, flag):
    like = lambda a, b: fn(a, b).astype(a.dtype)
    return lax.cond(flag > 0, like, lambda a, b: a, a, b)


def step(fn, b):
    """One trip of a loop, whose carry keeps its dtype."""
    return lambda c: fn(c, b).astype(c.dtype)


CALLED = {
    "jit": lambda fn, a, b, _: jax.jit(fn)(a, b),
    "checkpoint": lambda fn, a, b, _: jax.checkpoint(fn)(a, b),
    "scan": lambda fn, a, b, _: lax.scan(
        lambda c, y: (step(fn, y)(c), fn(y, c)), a, jnp.stack([b, b / 2])
    )[1][-1],
    "fori": lambda fn, a, b, _: lax.fori_loop(0, 2, lambda _, c: step(fn, b)(c), a),
    "cond": branch,
    "cond, not taken": lambda fn, a, b, flag: branch(fn, a, b, -flag),
    "switch": lambda fn, a, b, flag: lax.switch(
        flag, [step(jnp.subtract, b), step(fn, b), step(jnp.add, b)], a
    ),
    "vmap": lambda fn, a, b, _: jax.vmap(fn, (0, None))(jnp.stack([a, -a]), b)[1],
    "map": lambda fn, a, b, _: lax.map(lambda a: fn(a, b), jnp.stack([a, -a]))[0],
    "custom_jvp": lambda fn, a, b, _: with_jvp(fn, a, b),
    "custom_vjp": lambda fn, a, b, _: with_vjp(fn, a, b),
    "linearize": lambda fn, a, b, _: jax.linearize(lambda a: fn(a, b), a)[0],
}


def floating(a):
    return a if jnp.issubdtype(a.dtype, jnp.inexact) else a.astype(jnp.float32)


def run(program, pool, flag):
    """Returns the pool with the result of every step."""
    for name, first, second, body in program:
        a, b = (floating(pool[-1 - i % len(pool)]) for i in (first, second))
        if name in CALLED:
            result = CALLED[name](called(body, flag), a, b, flag)
        else:
            result = ONE[name](a) if name in ONE else (TWO | ROUGH)[name](a, b)
        pool = [*pool, result]
    return pool


def called(body, flag):
    return lambda a, b: floating(run(body, [b, a], flag)[-1])


def function(program):
    def fn(x, w, h, q, ids, mask, number, flag):
        pool = [ids, mask, q, h, number * w, x, matmul(x, w)]
        results = run(program, pool, flag)[len(pool) - 1 :]
        return {"results": results, "number": number, "last": results[-1]}

    return fn


def programs(*operations):
    flat = st.sampled_from([name for table in operations for name in table])
    index = st.integers(0, 8)
    plain = st.tuples(flat, index, index, st.none())
    # As likely as all others together, so that few programs have none.
    plain |= st.tuples(st.sampled_from(sorted(TWO)), index, index, st.none())
    steps = plain
    for _ in range(2):
        body = st.lists(steps, min_size=1, max_size=3)
        steps = plain | st.tuples(st.sampled_from(sorted(CALLED)), index, index, body)
    return st.lists(steps, min_size=2, max_size=6)


def assert_well_typed(fn, plain, *args):
    """Asserts that the rewritten jaxpr is valid, with the plain function's outputs."""
    closed, outputs = jax.make_jaxpr(fn, return_shape=True)(*args)
    check_jaxpr(open_jaxpr(closed))
    assert types(outputs) == types(jax.eval_shape(plain, *args))
    for eqn in eqns(closed, *MATMUL_NAMES):
        assert len(floats(eqn)) == 1
    return closed


@hypothesis.settings(max_examples=NUM_EXAMPLES // 4)
@hypothesis.given(programs(ONE, TWO), st.sampled_from(sorted(POLICIES)))
def test_values(program, policy):
    fn = function(program)
    new, old = autocast(fn, policy)(*ARGS), jax.jit(fn)(*ARGS)
    assert types(new) == types(old)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=0.03)


@hypothesis.settings(max_examples=2 * NUM_EXAMPLES)
@hypothesis.given(programs(ONE, TWO, ROUGH), st.sampled_from(sorted(POLICIES)))
def test_types(program, policy):
    fn = function(program)
    closed = assert_well_typed(autocast(fn, policy), fn, *ARGS)
    traced = jax.make_jaxpr(fn)(*ARGS)
    float32 = [
        e for e in eqns(closed, *MATMUL_NAMES) if floats(e) == {np.dtype(np.float32)}
    ]
    assert len(float32) < len(eqns(traced, *MATMUL_NAMES))


@hypothesis.settings(max_examples=NUM_EXAMPLES // 4)
@hypothesis.given(programs(ONE, TWO, ROUGH), st.sampled_from(sorted(POLICIES)))
def test_gradients(program, policy):
    fn = function(program)

    def loss(*args):
        return sum(jnp.sum(y.astype(jnp.float32)) for y in fn(*args)["results"])

    grad = lambda fn: jax.value_and_grad(fn, (0, 1))
    assert_well_typed(autocast(grad(loss), policy), grad(loss), *ARGS)
    assert_well_typed(grad(autocast(loss, policy)), grad(loss), *ARGS)
