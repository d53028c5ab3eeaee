"""Which sums are half: those that go on to a matmul, as in a model by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.primitive_probes import BF16, F32, H, W, X, eqns, outputs, rewrite
from jax import lax

import mpjax
from mpjax._jaxpr.core import dtype_of, walk
from mpjax._jaxpr.provenance import is_backward

B = np.linspace(-1, 1, 8, dtype=np.float32)
TARGET = np.ones((8, 8), np.float32)


def sums(fn, *args):
    """Returns the dtypes of the sums of arrays of a function under autocast."""
    adds = eqns(rewrite(fn, *args), "add", "add_any")
    return [dtype_of(e.outvars[0]) for e in adds if e.outvars[0].aval.size == X.size]


def normalized(x, scale=1.0, bias=0.0):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-6) * scale + bias


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x, w: jax.nn.relu(x @ w + B) @ w, [BF16]),
        (lambda x, w: (x @ w + B).sum(), [F32]),
        (lambda x, w: jax.nn.softmax(x @ w + B), [F32]),
        (lambda x, w: ((x @ w + B - TARGET) ** 2).mean(), [F32]),
        (lambda x, w: (x + x @ w) @ w, [BF16]),
        (lambda x, w: x + x @ w, [F32]),
        (lambda x, w: jnp.sin(x @ w + x) @ w, [F32]),
    ],
)
def test_a_sum_is_half_if_it_goes_on_to_a_matmul(fn, expected):
    assert sums(fn, X, W) == expected


def test_a_stream_is_half_between_normalizations():
    def stream(x, w):
        for _ in range(3):
            x = x + normalized(x, B, B) @ w
        return (normalized(x, B, B) @ w).sum()

    closed = rewrite(stream, H, W)
    stored = [e for e in eqns(closed, "add") if dtype_of(e.outvars[0]) == BF16]
    assert len(stored) == 3
    statistics = eqns(closed, "reduce_sum", "rsqrt", "square")
    assert len(statistics) >= 3 * 4
    for eqn in statistics:
        assert dtype_of(eqn.outvars[0]) == F32


def test_a_normalized_value_is_rounded_once():
    """Its bias is added in float32; the activation function takes half."""
    fn = lambda x, w: jax.nn.silu(normalized(x @ w, B, B)) @ w
    closed = rewrite(fn, X, W)
    assert [dtype for dtype in outputs(closed, "add") if dtype == BF16] == []
    assert outputs(closed, "logistic") == [BF16]
    (multiplied,) = [e for e in eqns(closed, "mul") if dtype_of(e.outvars[0]) == BF16]
    assert {dtype_of(x) for x in multiplied.invars} == {BF16}


def test_only_the_last_sum_of_a_chain_is_half():
    fn = lambda x, w: jnp.tanh(normalized(x @ w, B, B) + B + w @ x) @ w
    assert sums(fn, X, W) == [F32, F32, BF16]


def forward_sums(fn, *args):
    closed = jax.make_jaxpr(mpjax.autocast(fn))(*args)
    found = []
    for eqn, _, _ in walk(closed):
        if eqn.primitive.name == "add" and not is_backward(eqn):
            found.append(dtype_of(eqn.outvars[0]))
    return found


def test_the_forward_pass_is_the_same_with_a_gradient():
    def loss(w, x):
        h = jax.nn.relu(x @ w + B)
        prediction = (h + normalized(h, B, B) @ w) @ w + B
        return ((prediction - TARGET) ** 2).mean()

    without = forward_sums(loss, W, X)
    assert set(without) == {BF16, F32}
    assert forward_sums(jax.value_and_grad(loss), W, X) == without


def test_gradients_of_a_weight_used_twice_add_up_in_float32():
    loss = lambda w, x: (jnp.tanh(x @ w) @ w).sum()
    closed = rewrite(jax.grad(loss), W, X)
    assert outputs(closed, "add_any")[-1] == F32


@pytest.mark.parametrize(
    ("wrap", "num_bytes"), [(lambda fn: fn, 4), (jax.checkpoint, 2)]
)
def test_a_loop_carries_float32_and_saves_few_bytes(wrap, num_bytes):
    """With a checkpoint the stream in half; else all comes from it in float32."""
    step = wrap(lambda x, w: (x + normalized(x) @ w, None))
    loss = lambda ws, x: lax.scan(step, x, ws)[0].sum()
    forward, backward = eqns(rewrite(jax.grad(loss), np.stack([W, W, W]), X), "scan")
    for scan in (forward, backward):
        assert dtype_of(scan.outvars[0]) == F32
    saved = [v for v in forward.outvars if v.aval.shape == (3, *X.shape)]
    assert sum(dtype_of(v).itemsize for v in saved) == num_bytes


def test_a_loop_without_a_matmul_saves_float32():
    """Log-probabilities of a recursion, such as CTC's, would not survive half."""

    def recursion(logits):
        step = lambda a, x: (jnp.logaddexp(a, jnp.roll(a, 1)) + x, None)
        return lax.scan(step, logits[0], logits[1:])[0]

    loss = lambda w, x: jax.nn.logsumexp(recursion(jnp.tanh(x @ w)))
    scans = eqns(rewrite(jax.grad(loss), W, X), "scan")
    assert len(scans) == 2
    for scan in scans:
        floats = {dtype_of(v) for v in scan.outvars} - {np.dtype(bool)}
        assert floats == {F32}


def test_exact_gelu_saves_half():
    """Its erfc is an activation function, and runs in half between matmuls."""
    loss = lambda w, x: (jax.nn.gelu(x @ w, approximate=False) @ w).sum()
    assert outputs(rewrite(jax.grad(loss), W, X), "erfc") == [BF16]
