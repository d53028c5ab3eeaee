"""Functions with a precision fault in the line marked `here`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn

import mpjax
from mpjax.numerics import _findings as kinds


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


X, W = struct(16, 32), struct(32, 32)
X16 = struct(16, 32, dtype="float16")
X32, W32 = struct(16, 32, dtype="float32"), struct(32, 32, dtype="float32")
INDEX = struct(16, dtype="int32")
HALF, FULL = jnp.bfloat16, jnp.float32


class Fault(NamedTuple):
    """A function with one fault, in the line marked `here`."""

    fn: object
    args: tuple
    kind: str
    primitive: str
    num_calls: int = 1
    flops: int = 0


FAULTS = []


def fault(kind, primitive, *args, **more):
    def add(fn):
        FAULTS.append(Fault(fn, args, kind, primitive, **more))
        return fn

    return add


@fault(kinds.HALF_ACCUMULATION, "cumsum", X)
def cumulative_sum(x):
    return jnp.cumsum(x, 1)  # here


@fault(kinds.HALF_ACCUMULATION, "cumprod", X)
def cumulative_product(x):
    return jnp.cumprod(x, 0)  # here


@fault(kinds.HALF_ACCUMULATION, "reduce_sum", X16)
def sum_by_lax(x):
    return lax.reduce(x, np.float16(0), lax.add, (0,))  # here


@fault(kinds.HALF_ACCUMULATION, "reduce", X)
def sum_by_own_function(x):
    add = lambda a, b: a + jnp.abs(b)
    return lax.reduce(x, HALF(0), add, (0,))  # here


@fault(kinds.HALF_ACCUMULATION, "reduce_window_sum", X)
def pool(x):
    zero = np.zeros((), HALF)
    return lax.reduce_window(x, zero, lax.add, (4, 4), (4, 4), "VALID")  # here


@fault(kinds.HALF_ACCUMULATION, "reduce_sum", struct(32), struct(16, 32))
def bias_gradient(bias, x):
    def loss(bias):
        y = x + bias  # here
        return jnp.sum(y.astype(FULL) ** 2)

    return jax.grad(loss)(bias)


@fault(kinds.HALF_ACCUMULATION, "scatter-add", W, INDEX)
def embedding_gradient(table, index):
    def loss(table):
        rows = table[index]  # here
        return jnp.sum(rows.astype(FULL) ** 2)

    return jax.grad(loss)(table)


@fault(kinds.HALF_ACCUMULATION, "add", X, num_calls=16)
def carried_total(x):
    def step(total, row):
        return total + row, None  # here

    return lax.scan(step, jnp.zeros(32, HALF), x)[0]


@fault(kinds.HALF_ACCUMULATION, "add", X, num_calls=16)
def carried_total_rounded_each_time(x):
    def step(total, row):
        total = jnp.where(row > 0, total.astype(FULL) + row.astype(FULL), total)  # here
        return total.astype(HALF), None

    return lax.scan(step, jnp.zeros(32, HALF), x)[0]


@fault(kinds.HALF_ACCUMULATION, "add", X)
def total_in_a_while_loop(x):
    def step(state):
        i, total = state
        return i + 1, total + x[i]  # here

    return lax.while_loop(lambda s: s[0] < 16, step, (0, jnp.zeros(32, HALF)))


@fault(kinds.HALF_ACCUMULATION, "add_any", W, X, num_calls=16)
def recurrent_weight_gradient(w, x):
    def loss(w):
        step = lambda h, row: (nn.tanh(h @ w + row), None)  # here
        return lax.scan(step, jnp.zeros(32, HALF), x)[0].astype(FULL).sum()

    return jax.grad(loss)(w)


@fault(kinds.HALF_ACCUMULATION, "dot_general", X, W, flops=2 * 16 * 32 * 32)
def half_accumulator(x, w):
    return lax.dot(x, w, precision="BF16_BF16_BF16")  # here


@fault(kinds.HALF_FUNCTION, "exp", X16)
def softmax_in_half(x):
    return nn.softmax(x)  # here


@fault(kinds.HALF_FUNCTION, "log", X)
def log_in_half(x):
    return jnp.log(x + 1)  # here


@fault(kinds.HALF_FUNCTION, "pow", X)
def power_in_half(x):
    return jnp.abs(x) ** 0.3  # here


@fault(kinds.HALF_FUNCTION, "exp", X, num_calls=32)
def exp_in_nested_calls(x):
    @jax.checkpoint
    def inner(c):
        return jnp.exp(-c)  # here

    outer = jax.jit(lambda c: lax.scan(lambda c, _: (inner(c), None), c, length=8)[0])
    return lax.scan(lambda c, _: (outer(c), None), x, length=4)[0]


@fault(kinds.LEAK, "mul", X)
def numpy_scalar(x):
    return x * np.float32(2)  # here


@fault(kinds.LEAK, "div", X)
def numpy_function(x):
    return jax.jit(lambda x: x / np.sqrt(np.float32(2)))(x)  # here


@fault(kinds.LEAK, "add", X)
def positions(x):
    return x + jnp.linspace(0, 1, 32)  # here


@fault(kinds.LEAK, "sub", X, INDEX)
def labels(x, index):
    target = nn.one_hot(index, 32)
    return (x - target) ** 2  # here


@fault(kinds.LEAK, "select_n", X, num_calls=2)
def masked(x):
    def step(x, _):
        masked = jnp.where(x > 0, x, np.float32(-1e9))  # here
        return x, masked + x

    return lax.scan(step, x, length=2)[1].astype(HALF)


@fault(kinds.LEAK, "add", X, W)
def residual_stream(x, w):
    x = x + np.ones(32, np.float32)  # here
    for _ in range(2):
        x = x + nn.relu(x.astype(HALF) @ w)
    return x.astype(HALF) @ w


@fault(kinds.LEAK, "concatenate", X)
def class_token(x):
    token = np.zeros((1, 32), np.float32)
    return jnp.concatenate([token, x])  # here


@fault(kinds.LEAK, "add", X, jax.eval_shape(lambda: jax.random.key(0)))
def noise(x, key):
    return x + jax.random.normal(key, x.shape)  # here


@fault(kinds.LEAK, "mul", X, X16)
def two_halves(x, y):
    return x * y  # here


@fault(kinds.FLOAT32_MATMUL, "dot_general", X, W32, flops=2 * 16 * 32 * 32)
def mixed_operands(x, w):
    return x @ w  # here


@fault(kinds.FLOAT32_MATMUL, "dot_general", X, INDEX, flops=2 * 16 * 16 * 32)
def one_hot_matmul(x, index):
    return nn.one_hot(index, 16) @ x  # here


@fault(kinds.FLOAT32_MATMUL, "dot_general", X, W, flops=2 * 32 * 16 * 32)
def gradient_of_a_float32_output(x, w):
    def loss(w):
        y = jnp.matmul(x, w, preferred_element_type=FULL)  # here
        return jnp.sum(y**2)

    return jax.grad(loss)(w)


@fault(kinds.FLOAT64, "convert_element_type", X32)
def numpy_double(x):
    with jax.enable_x64(True):
        return x * np.float64(2)  # here


@fault(kinds.FLOAT64, "broadcast_in_dim", X32)
def default_dtype(x):
    with jax.enable_x64(True):
        return jnp.zeros(32) + x  # here


@fault(kinds.FLOAT64, "iota", X32)
def float64_range(x):
    with jax.enable_x64(True):
        return x + jnp.arange(32, dtype=float)  # here


@fault(kinds.ROUND_TRIP, "convert_element_type", X)
def there_and_back(x):
    wide = x.astype(FULL)
    return wide.reshape(-1)[None].astype(HALF)  # here


@fault(kinds.ROUND_TRIP, "convert_element_type", X, INDEX)
def there_and_back_around_a_slice(x, index):
    rows = lax.dynamic_slice_in_dim(x.astype(FULL), index[0], 8)
    return rows.astype(HALF)  # here


@fault(kinds.ROUND_TRIP, "convert_element_type", X)
def mean_of_half(x):
    mean = jnp.mean(x, 1)
    return mean.astype(FULL) + 1  # here


@fault(kinds.ROUND_TRIP, "convert_element_type", X32)
def rounded(x):
    return jax.jit(lambda x: x.T)(x.astype(HALF)).astype(FULL) * 2  # here


STATE = {"total": FULL(0), "mean": FULL(0)}


def updated(state, x):
    return state["total"] + x.sum(), state["mean"] * 0.9 + x.mean()


@fault(kinds.RETRACE, "add", STATE | {"total": 0.0}, np.ones(3, np.float32))
def python_number_in(state, x):
    total = state["total"] + x.sum()  # here
    return {"total": total, "mean": updated(state, x)[1]}, x


@fault(kinds.RETRACE, "select_n", STATE, np.ones(3, np.float32))
def python_number_out(state, x):
    _, mean = updated(state, x)
    return {"total": jnp.where(mean > 0, 1.0, 0.0), "mean": mean}  # here


@fault(kinds.RETRACE, "mul", STATE | {"total": HALF(0)}, np.ones(3, np.float32))
def other_dtype_out(state, x):
    _, mean = updated(state, x)
    return {"total": state["total"] * mean, "mean": mean}, mean  # here


@fault(kinds.CANCELLATION, "sub", X, W)
def squared_distances(x, w):
    squares = lambda a: jnp.sum(a.astype(FULL) ** 2, -1)
    product = (x @ w.T).astype(FULL)
    return squares(x)[:, None] + squares(w)[None] - 2 * product  # here


@fault(kinds.CANCELLATION, "sub", X, W)
def squared_distances_in_another_order(x, w):
    wide, rows = x.astype(FULL), w.astype(FULL)
    square = jnp.einsum("ij,ij->i", wide, wide)[:, None]
    twice = 2 * jnp.einsum("ik,jk->ij", x, w)
    return (square - twice) + jnp.square(rows).sum(1)  # here


@fault(kinds.CANCELLATION, "add", X32, W32)
def kernel_under_autocast(x, w):
    @mpjax.autocast
    def squared(x, w):
        products = -2 * jnp.dot(x, w.T)
        return jnp.sum(x * x, 1, keepdims=True) + jnp.sum(w * w, 1) + products  # here

    return jnp.exp(-squared(x, w))


@fault(kinds.DECISION, "top_k", X32, W32)
def router_under_autocast(x, w):
    @mpjax.autocast
    def route(x, w):
        probabilities = nn.softmax(x @ w)
        return lax.top_k(probabilities, 2)[1]  # here

    return route(x, w)


@fault(kinds.DECISION, "argmax", X, W)
def nearest_code(x, w):
    scores = (x @ w.T).astype(FULL)
    index = jnp.argmax(scores, 1)  # here
    return w[index] * 2


@fault(kinds.DECISION, "argmin", X, W)
def mask_of_the_chosen(x, w):
    scores = x @ w
    chosen = jnp.argmin(scores, 1)  # here
    mask = chosen[:, None] == jnp.arange(32)
    return jnp.where(mask, x, 0)


@fault(kinds.DECISION, "sort", X, W)
def order_of_scores(x, w):
    scores = (x @ w).astype(FULL)[:, 0]
    order = jnp.argsort(scores)  # here
    return jnp.take(x, order, 0)


@fault(kinds.DECISION, "top_k", X32, W32)
def router_after_dropout(x, w):
    @mpjax.autocast
    def route(x, w):
        keep = jax.random.bernoulli(jax.random.key(0), 0.9, x.shape)
        scores = jnp.where(keep, x, 0) @ w + 1.0
        return lax.top_k(scores, 2)[1]  # here

    return route(x, w)
