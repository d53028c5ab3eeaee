"""Functions with a fault in the line marked `here`, and the record to be found."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn

import mpjax
from mpjax.numerics import _causes as causes

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
W = np.full((4, 4), 0.5, np.float32)
HALF = X.astype(np.float16)


class Fault(NamedTuple):
    """A function with one fault, and the record that it must give."""

    fn: Any
    args: tuple
    primitive: str
    cause: str
    iterations: tuple = ()
    is_backward: bool = False


def half_matmul(x, w):
    y = jnp.tanh(x)
    y = (y * 200) @ (w * 1000)  # here
    return jnp.sum(nn.softmax(y))


def half_cast(x):
    return jnp.sum((x * 1e6).astype(jnp.float16))  # here


def half_sum_of_squares(x):
    y = x * jnp.float16(250)
    y = y * y  # here
    return jnp.sum(jnp.sqrt(y.astype(jnp.float32)))


def exp_overflow(x):
    return jnp.log(jnp.sum(jnp.exp(x * 100)))  # here


def float32_square(x):
    big = x * 1e30
    return jnp.sum(big * big)  # here


def float32_norm(x):
    return jnp.linalg.norm(x * 1e25)  # here


def softmax_by_hand(x):
    e = jnp.exp(x * 1000)  # here
    return e / e.sum()


def divide_by_zero(x):
    return 1 / (x - x)  # here


def zero_over_zero(x):
    return (x - x) / (x - x)  # here


def normalise(x):
    centred = x - x
    return centred / jnp.sqrt(jnp.sum(centred**2))  # here


def inverse_power(x):
    return (x - x) ** -2  # here


def inverse_root(x):
    return lax.rsqrt(jnp.abs(x) * 0)  # here


def epsilon_that_half_flushes(x):
    eps = jnp.float16(1e-8)
    return 1 / (x * 0 + eps)  # here


def log_of_negative(x):
    return jnp.sum(jnp.log(x))  # here


def log_of_zero(x):
    p = nn.relu(x)
    return -jnp.sum(jnp.log(p))  # here


def log1p_at_minus_one(x):
    return jnp.log1p(x)  # here


def root_of_negative(x):
    return jnp.sum(jnp.sqrt(x))  # here


def arcsine(x):
    return jnp.arcsin(x * 2)  # here


def power_of_negative(x):
    return jnp.power(x, 0.5)  # here


def row_masked_whole(x):
    masked = jnp.where(jnp.array([[False], [True], [True]]), x, -jnp.inf)
    return jnp.exp(masked - masked.max(-1, keepdims=True))  # here


def zero_times_inf(x):
    return (x * 0) * jnp.inf  # here


def inside_jit(x):
    @jax.jit
    def inner(x):
        return jnp.log(x)  # here

    return inner(x).sum()


def inside_remat(x):
    @jax.checkpoint
    def inner(x):
        return jnp.log(x - 5)  # here

    return inner(x).sum()


def inside_cond(x):
    bad = lambda x: jnp.log(x - 5)  # here
    return lax.cond(x[0, 0] < 0, bad, lambda x: x, x)


def inside_scan(x):
    def body(c, _):
        c = c - 1
        return c, jnp.sqrt(c)  # here

    return lax.scan(body, x[2, 3] + 4.5, None, 10)


def carried_in_scan(x):
    def body(c, x):
        c = c * c  # here
        return c + 0 * x.sum(), None

    return lax.scan(body, jnp.float32(4.0), jnp.ones((8, 2)))[0] + x.sum()


def reversed_scan(x):
    body = lambda c, t: (c + 1 / t, None)  # here
    return lax.scan(body, 0.0, jnp.arange(6.0), reverse=True)[0] + x.sum()


def scan_in_scan(x):
    def outer(c, i):
        def inner(c, j):
            return c + 1 / (2 * i + j - 5), None  # here

        return lax.scan(inner, c, jnp.arange(2.0))[0], None

    return lax.scan(outer, x.sum(), jnp.arange(4.0))[0]


def inside_while(x):
    def body(c):
        i, y = c
        return i + 1, y + jnp.log(2.0 - i)  # here

    return lax.while_loop(lambda c: c[0] < 4, body, (0, x.sum()))[1]


def custom_jvp_inside(x):
    def inner(x):
        return jnp.log(x)  # here

    fn = jax.custom_jvp(inner)
    fn.defjvps(lambda t, _, x: t / x)
    return fn(x).sum()


def root_at_zero(x):
    return jnp.sum(jnp.sqrt(jnp.maximum(x, 0)))  # here


def in_a_function_of_jax(x):
    return jnp.var(jnp.exp(x * 80)) + jnp.where(x > 0, x, 0).sum()  # here


def norm_at_zero(x):
    return jnp.sqrt(jnp.sum((x * 0) ** 2))  # here


def where_after_log(x):
    x = jnp.maximum(x, 0)
    return jnp.sum(jnp.where(x > 0, jnp.log(x), 0))  # here


def backward_in_scan(x):
    def body(c, t):
        y = jnp.maximum(c - t, 0)
        return c, jnp.where(y > 0, jnp.log(y), 0)  # here

    return lax.scan(body, x[2, 3], jnp.arange(4.0) - 2)[1].sum()


def by_a_large_scale(x):
    y = jnp.tanh(x.astype(jnp.float16) @ W.astype(jnp.float16))
    return jnp.sum(y.astype(jnp.float32)) * 2.0**20  # here


gradient = jax.value_and_grad
MILLION = jnp.asarray(1e6)
NEAR = np.random.default_rng(0).normal(4, 1, (64, 32)).astype(np.float32)
CENTERS = NEAR[:8] + np.random.default_rng(1).normal(0, 0.1, (8, 32)).astype(np.float32)


def squared_distances(a, b):
    return (a**2).sum(-1)[:, None] + (b**2).sum(-1)[None] - 2 * a @ b.T


@mpjax.autocast
def distances(a, b):
    return jnp.sqrt(squared_distances(a, b))  # here


@mpjax.autocast
def logarithms_of_distances(a, b):
    return jnp.log(jax.jit(squared_distances)(a, b))  # here


def clipped_distances(a, b):
    return jnp.sqrt(jnp.maximum(squared_distances(a, b), 0)).sum()  # here


@mpjax.autocast
def gradient_of_clipped_distances(a, b):
    return jax.grad(clipped_distances)(a, b)


@mpjax.autocast
def root_of_a_negative_score(a, b):
    return jnp.sqrt(a @ b.T - 500)  # here


def row_masked_whole_in_half(x):
    masked = jnp.where(x > 0, x, -1e9)  # here
    return nn.softmax(masked)


def constant_too_large_for_half(x):
    return x * MILLION.astype(jnp.float16)  # here


def singular_solve(x):
    return jnp.linalg.solve(x, np.ones(2, np.float32))  # here


def singular_inverse(x):
    return jnp.linalg.inv(x)  # here


def singular_triangle(x):
    return jax.scipy.linalg.solve_triangular(x * 0, np.ones(2, np.float32))  # here


def not_positive(x):
    return jnp.linalg.cholesky(-x)  # here


SINGULAR = np.array([[1, 2], [2, 4]], np.float32)

FAULTS = [
    Fault(distances, (NEAR, CENTERS), "sqrt", causes.CANCELLATION),
    Fault(logarithms_of_distances, (NEAR, CENTERS), "log", causes.CANCELLATION),
    Fault(root_of_a_negative_score, (NEAR, CENTERS), "sqrt", causes.OUT_OF_DOMAIN),
    Fault(
        row_masked_whole_in_half,
        (HALF - 2,),
        "convert_element_type",
        causes.CONSTANT_CAST,
    ),
    Fault(
        constant_too_large_for_half,
        (HALF + 2,),
        "convert_element_type",
        causes.CONSTANT_CAST,
    ),
    Fault(singular_solve, (SINGULAR,), "triangular_solve", causes.SINGULAR),
    Fault(singular_inverse, (SINGULAR,), "triangular_solve", causes.SINGULAR),
    Fault(singular_triangle, (SINGULAR,), "triangular_solve", causes.SINGULAR),
    Fault(not_positive, (SINGULAR,), "cholesky", causes.NOT_POSITIVE),
    Fault(
        half_matmul, (HALF, W.astype(np.float16)), "dot_general", causes.HALF_OVERFLOW
    ),
    Fault(half_cast, (X,), "convert_element_type", causes.HALF_OVERFLOW),
    Fault(half_sum_of_squares, (HALF + 1,), "mul", causes.HALF_OVERFLOW),
    Fault(exp_overflow, (X,), "exp", causes.OVERFLOW),
    Fault(float32_square, (X,), "mul", causes.OVERFLOW),
    Fault(softmax_by_hand, (X,), "exp", causes.OVERFLOW),
    Fault(divide_by_zero, (X,), "div", causes.DIVISION_BY_ZERO),
    Fault(zero_over_zero, (X,), "div", causes.DIVISION_BY_ZERO),
    Fault(normalise, (X,), "div", causes.DIVISION_BY_ZERO),
    Fault(inverse_power, (X,), "integer_pow", causes.DIVISION_BY_ZERO),
    Fault(inverse_root, (X,), "rsqrt", causes.DIVISION_BY_ZERO),
    Fault(epsilon_that_half_flushes, (HALF,), "div", causes.DIVISION_BY_ZERO),
    Fault(log_of_negative, (X,), "log", causes.OUT_OF_DOMAIN),
    Fault(log_of_zero, (X,), "log", causes.LOG_OF_ZERO),
    Fault(log1p_at_minus_one, (X,), "log1p", causes.LOG_OF_ZERO),
    Fault(root_of_negative, (X,), "sqrt", causes.OUT_OF_DOMAIN),
    Fault(arcsine, (X,), "asin", causes.OUT_OF_DOMAIN),
    Fault(power_of_negative, (X,), "pow", causes.OUT_OF_DOMAIN),
    Fault(row_masked_whole, (X,), "sub", causes.NAN_OF_INF),
    Fault(zero_times_inf, (X,), "mul", causes.NAN_OF_INF),
    Fault(inside_jit, (X,), "log", causes.OUT_OF_DOMAIN),
    Fault(inside_remat, (X,), "log", causes.OUT_OF_DOMAIN),
    Fault(gradient(inside_remat), (X,), "log", causes.OUT_OF_DOMAIN),
    Fault(inside_cond, (X,), "log", causes.OUT_OF_DOMAIN),
    Fault(inside_scan, (X,), "sqrt", causes.OUT_OF_DOMAIN, (5,)),
    Fault(carried_in_scan, (X,), "mul", causes.OVERFLOW, (5,)),
    Fault(reversed_scan, (X,), "div", causes.DIVISION_BY_ZERO, (0,)),
    Fault(scan_in_scan, (X,), "div", causes.DIVISION_BY_ZERO, (2, 1)),
    Fault(inside_while, (X,), "log", causes.LOG_OF_ZERO, (2,)),
    Fault(in_a_function_of_jax, (X,), "square", causes.OVERFLOW),
    Fault(custom_jvp_inside, (X,), "log", causes.OUT_OF_DOMAIN),
    Fault(gradient(root_at_zero), (X,), "div", causes.DIVISION_BY_ZERO),
    Fault(gradient(norm_at_zero), (X,), "div", causes.DIVISION_BY_ZERO),
    Fault(gradient(where_after_log), (X,), "div", causes.DIVISION_BY_ZERO, (), True),
    Fault(gradient(backward_in_scan), (X,), "div", causes.DIVISION_BY_ZERO, (3,), True),
    Fault(
        gradient(jax.jit(where_after_log)),
        (X,),
        "div",
        causes.DIVISION_BY_ZERO,
        (),
        True,
    ),
    Fault(
        gradient(by_a_large_scale),
        (X,),
        "convert_element_type",
        causes.HALF_OVERFLOW,
        (),
        True,
    ),
]
