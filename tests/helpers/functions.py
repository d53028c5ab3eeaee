"""Functions of many kinds with their arguments, to test what autocast preserves.

The matrices hold small multiples of 1/4, so that one matmul is exact in half and values
that are sorted, compared or rounded after it stay the same.

B: batch, H, W: height and width, D: features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
from helpers.primitive_probes import integers
from jax import lax, nn
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.numpy import linalg


class Case(NamedTuple):
    """A function and its arguments."""

    fn: Callable[..., Any]
    args: tuple


def case(fn, *args):
    return Case(fn, args)


def types(tree):
    """Returns the structure, and shape, dtype and weak type of each leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    avals = [getattr(x, "aval", x) for x in leaves]
    return treedef, [(a.shape, a.dtype, a.weak_type) for a in avals]


def quarters(seed, *shape):
    return integers(seed, *shape, high=2) / np.float32(4)


X, W = quarters(0, 8, 8), quarters(1, 8, 8)
BATCH = quarters(3, 3, 8, 8)
IMAGE, KERNEL = quarters(4, 2, 4, 8, 8), quarters(5, 4, 4, 3, 3)
IDS = np.random.default_rng(6).integers(0, 8, (8,)).astype(np.int32)
MASK = np.tril(np.ones((8, 8), bool))
KEY = jax.random.key(7)

conv = partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")


@jax.custom_jvp
def with_own_jvp(h):
    return jnp.sin(h)


with_own_jvp.defjvps(lambda dh, _, h: 2 * dh * jnp.cos(h))


@jax.custom_jvp
def matmul_with_own_jvp(x, w):
    return x @ w


matmul_with_own_jvp.defjvps(lambda dx, _, x, w: dx @ w, lambda dw, _, x, w: x @ dw)


@jax.custom_vjp
def matmul_with_own_vjp(x, w):
    return x @ w


matmul_with_own_vjp.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g)
)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def nondiff(act, x, w, times):
    return act(x @ w) * times


nondiff.defvjp(
    lambda act, x, w, times: (nondiff(act, x, w, times), (x, w)),
    lambda act, times, kept, g: (times * g @ kept[1].T, times * kept[0].T @ g),
)


@jax.custom_vjp
def rows(x, w, ids):
    """Takes integers, and returns integers."""
    return x[ids] @ w, ids + 1


rows.defvjp(
    lambda x, w, ids: (rows(x, w, ids), (x, w, ids)),
    lambda kept, g: (
        jnp.zeros_like(kept[0]).at[kept[2]].add(g[0] @ kept[1].T),
        kept[0][kept[2]].T @ g[0],
        None,
    ),
)


@jax.custom_jvp
def rows_forward(x, w, ids):
    return x[ids] @ w, ids + 1


@rows_forward.defjvp
def _rows_jvp(primals, tangents):
    (x, w, ids), (dx, dw, _) = primals, tangents
    zero = np.zeros(ids.shape, jax.dtypes.float0)
    return rows_forward(x, w, ids), (dx[ids] @ w + x[ids] @ dw, zero)


@jax.custom_vjp
def symbolic(x, w):
    return x @ w, 2 * x


def _symbolic_bwd(kept, cotangents):
    g, other = cotangents
    dx = 0 if isinstance(other, SymbolicZero) else 2 * other
    return g @ kept[1].T + dx, kept[0].T @ g


symbolic.defvjp(
    lambda x, w: (symbolic(x.value, w.value), (x.value, w.value)),
    _symbolic_bwd,
    symbolic_zeros=True,
)


@jax.custom_jvp
def symbolic_forward(x, w):
    return x @ w


@partial(symbolic_forward.defjvp, symbolic_zeros=True)
def _symbolic_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    parts = [] if isinstance(dx, SymbolicZero) else [dx @ w]
    parts += [] if isinstance(dw, SymbolicZero) else [x @ dw]
    return x @ w, sum(parts)


@jax.custom_gradient
def by_gradient(x, w):
    return x @ w, lambda g: (g @ w.T, x.T @ g)


def through_a_ref(h):
    ref = jax.new_ref(h)
    ref[0] += h[1]
    return ref[...]


def _matmuls():
    heads = BATCH.reshape(3, 8, 2, 4)
    return {
        "matmul": case(jnp.matmul, X, W),
        "batched": case(jnp.matmul, BATCH, W),
        "vector": case(lambda x, w: x[0] @ w, X, W),
        "dot of vectors": case(lambda x: jnp.vdot(x[0], x[1]), X),
        "tensordot": case(lambda x: jnp.tensordot(x, x, [(0, 2), (0, 2)]), BATCH),
        "einsum": case(lambda x, w: jnp.einsum("bij,jk,bkl->il", x, w, x), BATCH, W),
        "attention": case(nn.dot_product_attention, heads, heads, heads),
        "causal": case(partial(nn.dot_product_attention, is_causal=True), *[heads] * 3),
        "ragged": case(lax.ragged_dot, X, BATCH, np.array([2, 5, 1], np.int32)),
        "by integers": case(lambda x, i: x @ (i[:, None] * i), X, IDS),
        "preferred type": case(
            partial(jnp.matmul, preferred_element_type=jnp.float32), X, W
        ),
        "multi_dot": case(lambda x, w: linalg.multi_dot([x, w, x, w]) @ x, X, W),
        "matrix power": case(lambda x: linalg.matrix_power(x, 3) @ x, X),
        "custom_jvp": case(matmul_with_own_jvp, X, W),
        "custom_vjp": case(matmul_with_own_vjp, X, W),
        "conv": case(conv, IMAGE, KERNEL),
        "strided conv": case(partial(conv, window_strides=(2, 3)), IMAGE, KERNEL),
        "dilated conv": case(partial(conv, rhs_dilation=(2, 2)), IMAGE, KERNEL),
        "transposed conv": case(
            partial(lax.conv_transpose, strides=(2, 2), padding="SAME"),
            IMAGE.transpose(0, 2, 3, 1),
            KERNEL.transpose(2, 3, 0, 1),
        ),
        "grouped conv": case(
            partial(conv, feature_group_count=2), IMAGE, KERNEL[:, :2]
        ),
        "conv grouped by batch": case(
            partial(conv, batch_group_count=2), IMAGE, KERNEL
        ),
        "convolve": case(lambda x: jnp.convolve(x[0], x[1]), X),
        "convolve2d": case(jsp.signal.convolve2d, X, W[:3, :3]),
        "patches": case(
            lambda x: lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "SAME"),
            IMAGE,
        ),
    }


def _calls():
    step = lambda c, w: (jnp.tanh(c @ w), c.sum())
    counted = lambda i, c: jnp.tanh(c @ W.astype(c.dtype)) + i
    branches = [lambda h: h @ h, lambda h: -h, jnp.sin]
    add = lambda c, w: ((c[0] + 1, jax.random.split(c[1], 1)[0], c[2] @ w), c[0])
    return {
        "scan": case(lambda x, ws: lax.scan(step, x, ws), X, BATCH),
        "reversed scan": case(
            partial(lax.scan, step, reverse=True, unroll=2), X, BATCH
        ),
        "scan of a count and a key": case(
            lambda key, x, ws: lax.scan(add, (0, key, x), ws), KEY, X, BATCH
        ),
        "scan of nothing": case(lambda x: lax.scan(step, x, x[None, :, :][:0]), X),
        "while": case(
            lambda x, w: lax.while_loop(
                lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x)
            ),
            X,
            W,
        ),
        "fori": case(lambda x: lax.fori_loop(0, 3, counted, x), X),
        "fori to an argument": case(
            lambda x, n: lax.fori_loop(0, n, counted, x), X, np.int32(3)
        ),
        "cond": case(
            lambda x, w: lax.cond(x[0, 0] > 9, jnp.sin, lambda h: h @ w, x @ w), X, W
        ),
        "switch": case(lambda i, x: lax.switch(i, branches, x @ x), np.int32(1), X),
        "vmapped switch": case(
            jax.vmap(lambda i, x: lax.switch(i, branches, x)), IDS[:3] % 3, BATCH
        ),
        "map": case(lambda x, w: lax.map(lambda a: a @ w, x), BATCH, W),
        "map in batches": case(
            lambda x, w: lax.map(lambda a: a @ w, x, batch_size=2), BATCH, W
        ),
        "associative_scan": case(partial(lax.associative_scan, jnp.matmul), BATCH),
        "platforms": case(
            lambda x: lax.platform_dependent(x @ x, cpu=jnp.sin, default=jnp.cos), X
        ),
        "nested jit": case(lambda x: jax.jit(jax.jit(jnp.matmul))(x, x) + 1, X),
        "static and donated": case(
            lambda x: jax.jit(
                lambda x, n, y: n * (x @ y), static_argnums=1, donate_argnums=2
            )(x, 3, x + 1),
            X,
        ),
        "barrier": case(
            lambda x, w: lax.optimization_barrier((x @ w, x, IDS, x @ w)), X, W
        ),
        "vectorize": case(
            jnp.vectorize(lambda a, b: a @ b, signature="(n,m),(m)->(n)"), BATCH, X[0]
        ),
        "checkpoint": case(jax.checkpoint(lambda x, w: jnp.sin(x @ w) @ w), X, W),
        "checkpoint of dots": case(
            jax.checkpoint(
                lambda x, w: jnp.sin(x @ w) @ w,
                policy=jax.checkpoint_policies.dots_saveable,
            ),
            X,
            W,
        ),
        "checkpoint of names": case(
            jax.grad(
                jax.checkpoint(
                    lambda x, w: (checkpoint_name(jnp.sin(x @ w), "h") @ w).sum(),
                    policy=jax.checkpoint_policies.save_only_these_names("h"),
                )
            ),
            X,
            W,
        ),
        "linear_transpose": case(
            lambda x, w: jax.linear_transpose(lambda a: a @ w, x)(x), X, W
        ),
        "custom_root": case(
            lambda x, w: lax.custom_root(
                lambda y: y - x @ w,
                x,
                lambda f, y: y - f(y),
                lambda g, y: y / g(jnp.ones_like(y)),
            ),
            X,
            W,
        ),
        "gradient inside": case(jax.value_and_grad(lambda x: jnp.sum((x @ x) ** 2)), X),
        "hessian inside": case(
            jax.hessian(lambda v, w: jnp.sum(jnp.tanh(v @ w))), X[0], W
        ),
        "jacfwd inside": case(jax.jacfwd(lambda v, w: jnp.sin(v @ w)), X[0], W),
    }


# Functions of a matrix, without a matmul that autocast may change...
OPS = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "elu": nn.elu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "softplus": nn.softplus,
    "softmax": nn.softmax,
    "log_softmax": nn.log_softmax,
    "logsumexp": lambda h: nn.logsumexp(h, axis=-1, where=MASK),
    "standardize": nn.standardize,
    "infinite mask": lambda h: nn.softmax(jnp.where(MASK, h, -jnp.inf)),
    "least as a mask": lambda h: nn.softmax(jnp.where(MASK, h, jnp.finfo(h.dtype).min)),
    "where": lambda h: jnp.where(h > 0, h, 0),
    "select": lambda h: jnp.select([h > 1, h > 0], [h, -h], 3.0),
    "triangles": lambda h: (jnp.tril(h), jnp.triu(h, 1), jnp.diag(h), jnp.trace(h)),
    "sort": jnp.sort,
    "argsort": lambda h: jnp.argsort(h, axis=0),
    "sort of two": lambda h: lax.sort((h, 2 * h), num_keys=1),
    "top_k": lambda h: lax.top_k(h, 3),
    "argmax": lambda h: (h.argmax(), h.argmin(-1), h.max(0)),
    "median": lambda h: (jnp.median(h), jnp.quantile(h, 0.3, axis=0)),
    "unique": lambda h: jnp.unique(h, size=9, fill_value=-1),
    "searchsorted": lambda h: jnp.searchsorted(h[0].sort(), h[1]),
    "gather": lambda h: (h[IDS], h[0, 1], h.at[IDS + 2].get(mode="fill")),
    "take_along_axis": lambda h: jnp.take_along_axis(h, IDS[:, None], axis=1),
    "dynamic slices": lambda h: lax.dynamic_update_slice(h, h[:2] + 1, IDS[:2]),
    "scatter": lambda h: (h.at[IDS].add(h), h.at[0].set(1), h.at[1].mul(h[2])),
    "segment_sum": lambda h: jax.ops.segment_sum(h, IDS, 9),
    "one_hot": lambda h: h * nn.one_hot(IDS, 8, dtype=h.dtype),
    "pool": lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID"),
    "cumulative": lambda h: (h.cumsum(0), h.cumprod(1), lax.cumlogsumexp(h)),
    "cummax": lambda h: (lax.cummax(h), lax.cummin(h, reverse=True)),
    "reductions": lambda h: (h.sum(), h.mean(0), h.var(1), h.std(), h.prod(0), h.any()),
    "generic reduce": lambda h: lax.reduce(h, h[0, 0], lambda a, b: a + b, (0,)),
    "diff and roll": lambda h: (jnp.diff(h), jnp.roll(h, 3), jnp.flip(h)),
    "blocks": lambda h: (jnp.block([[h, h], [h, -h]]), jnp.pad(h, 1), h[::2]),
    "norms": lambda h: (linalg.norm(h), linalg.norm(h, 1, axis=0)),
    "comparisons": lambda h: (h > 0, h == h.T, jnp.isfinite(h), ~(h < 1)),
    "to integers": lambda h: (h.astype(int), jnp.round(h), h // 1, h % 1, jnp.sign(h)),
    "fewer bits": lambda h: lax.reduce_precision(h, 5, 3),
    "powers": lambda h: (h**2, h**3.0, abs(h) ** 0.5, 2.0**h, jnp.hypot(h, 1)),
    "normal": lambda h: h * jax.random.normal(KEY, h.shape, h.dtype),
    "dropout": lambda h: jnp.where(jax.random.bernoulli(KEY, 0.7, h.shape), h / 0.7, 0),
    "permutation": lambda h: jax.random.permutation(KEY, h),
    "callback": lambda h: jax.pure_callback(lambda h: 2 * h, h, h),
    "print": lambda h: (jax.debug.callback(lambda h: None, h), h + 1)[1],
    "stop_gradient": lambda h: lax.stop_gradient(h) * h,
    "named scope": jax.named_scope("here")(jnp.tanh),
    "own jvp": with_own_jvp,
    "mutable array": through_a_ref,
    "slope": jax.grad(lambda h: jnp.sum(jnp.tanh(h) ** 2)),
    "tangent": lambda h: jax.jvp(nn.softmax, (h,), (h,)),
}
# ... and functions that do not exist in half.
FULL_OPS = {
    "interp": lambda h: jnp.interp(h, jnp.arange(8), h[0]),
    "fft": lambda h: (jnp.fft.fft(h), jnp.fft.rfft2(h).real, jnp.fft.irfft(h)),
    "complex": lambda h: (h * 1j, abs(lax.complex(h, -h)), jnp.exp(1j * h)),
    "solve": lambda h: linalg.solve(h + 9 * jnp.eye(8, dtype=h.dtype), h[0]),
    "cholesky": lambda h: linalg.cholesky(h + h.T + 40 * jnp.eye(8, dtype=h.dtype)),
    "eigh": lambda h: linalg.eigvalsh(h + h.T),
    "qr": lambda h: linalg.qr(h),
    "svd": lambda h: linalg.svd(h, compute_uv=False),
    "det": lambda h: (linalg.det(h), linalg.slogdet(h)),
    "bits": lambda h: lax.bitcast_convert_type(h, jnp.uint8),
    "special": lambda h: (jsp.special.erf(h), jsp.special.gammaln(abs(h) + 1)),
}


MATMULS, CALLS = _matmuls(), _calls()
WITHOUT_MATMUL = {name: case(op, X) for name, op in (OPS | FULL_OPS).items()}
AFTER_A_MATMUL = {
    name: case(lambda x, w, op=op: op(x @ w), X, W)
    for name, op in (OPS | FULL_OPS).items()
}
# Autocast always rebuilds their equation, for the sake of its derivative.
MADE_ANEW = ("custom_jvp", "custom_vjp", "custom_root")
