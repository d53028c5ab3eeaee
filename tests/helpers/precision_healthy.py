"""Functions that mix half and float32 as they should."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers.precision_faults import FULL, HALF
from jax import lax, nn


def softmax_in_float32(x):
    wide = x.astype(FULL)
    shifted = jnp.exp(wide - wide.max(-1, keepdims=True))
    return (shifted / shifted.sum(-1, keepdims=True)).astype(x.dtype)


def layer_norm(x, scale):
    wide = x.astype(FULL)
    mean, var = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
    normed = (wide - mean) * lax.rsqrt(var + 1e-6)
    return (normed * np.float32(1)).astype(x.dtype) * scale


def attention(x, w, scale):
    x = layer_norm(x, scale)
    probabilities = softmax_in_float32(x @ w @ x.T / 32**0.5)
    return x + nn.gelu(probabilities @ x) * 2


def attention_gradient(x, w):
    scale = np.ones(32, HALF)
    return jax.grad(lambda x: attention(x, w, scale).astype(FULL).sum())(x)


def cast_tree(params):
    return jax.tree.map(lambda a: a.astype(HALF), params)


def weight_gradient(params, x):
    return jax.grad(lambda p: (x @ p["w"]).sum())(params)


def rms_norm(x, scale):
    y = x - np.zeros((), np.float32)
    y = y * lax.rsqrt((y**2).mean(-1, keepdims=True)) * scale
    return y.astype(x.dtype)


def rms_norm_gradient(x, scale):
    loss = lambda x, scale: rms_norm(x, scale).sum() + rms_norm(x, scale).var()
    return jax.grad(loss, argnums=(0, 1))(x, scale)


def scanned_residuals(x, w):
    body = jax.checkpoint(lambda x, _: (x + nn.relu(x @ w), None))
    return lax.scan(body, x, length=24)[0]


def decayed(x, w):
    return lax.scan(lambda h, row: (h * 0.9 + row @ w, h), x[0], x)


def float32_total(x, w):
    add = lambda total, row: (total + row, None)
    return lax.scan(add, jnp.zeros(32), x)[0].astype(HALF) @ w


def few_terms(x, w):
    total, _ = lax.scan(lambda c, row: (c + row, None), x[0], x[:4])
    return total + lax.reduce_window(x, HALF(0), lax.add, (2, 2), (2, 2), "VALID").max()


def half_constants(x, w):
    noise = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
    mask = jnp.linspace(0, 1, 32).astype(x.dtype)
    return jnp.where(x > 0, x * 0.1 + noise, np.array(-1e9, x.dtype)) * mask


def explicit_float32(x, w):
    loss = (x @ w).astype(FULL) * np.float32(2) + jnp.linspace(0, 1, 32)
    return jnp.mean(lax.convert_element_type(x, FULL) * np.ones(32, np.float32)) + loss


def rounded_where_it_is_read_twice(x, w):
    y = (x.astype(FULL) + 1).astype(HALF)
    return y @ w, y.astype(FULL)


def rounded_for_the_other_part(x, w):
    left, right = jnp.split((x.astype(FULL) + 1).astype(HALF), 2, axis=1)
    return left.astype(FULL), right @ w[:16]


def behind_a_barrier(x, w):
    wide, scale = lax.optimization_barrier((x.astype(FULL), jnp.sum(w, dtype=FULL)))
    return scale.astype(HALF), wide + 1


def unique_scatter(x, w):
    return w.at[jnp.arange(16)].add(x, unique_indices=True), jnp.prod(x), jnp.std(x)


def accuracy(x, w, index):
    logits = (x @ w).astype(FULL)
    return jnp.mean(jnp.argmax(logits, 1) == index)


def masked_accuracy(x, w, index):
    correct = jnp.argmax((x @ w).astype(FULL), -1) == index
    return jnp.sum(correct & (index > 0)) / jnp.sum(index > 0)


def residual(x, w):
    error = (x @ w).astype(FULL) - np.ones((16, 32), np.float32)
    return jnp.sqrt(jnp.mean(error**2))


def sampled(x, w):
    logits = (x @ w).astype(FULL)
    return jax.random.categorical(jax.random.key(0), logits)


def sorted_by_integers(x, w, index):
    order = jnp.argsort(index)
    return (x @ w)[order]


def routed_in_float32(x, w):
    scores = x.astype(FULL) @ w.astype(FULL)
    return lax.top_k(nn.softmax(scores), 2)[1]


def distances_by_differences(x, w):
    wide = x.astype(FULL)[:, None] - w.astype(FULL)[None]
    return jnp.sqrt(jnp.sum(wide**2, -1))


def distances_in_float32(x, w):
    a, b = x.astype(FULL), w.astype(FULL)
    return (a**2).sum(-1)[:, None] + (b**2).sum(-1) - 2 * a @ b.T


def penalty_and_product(x, w):
    penalty = 1e-3 * jnp.sum(w.astype(FULL) ** 2)
    return jnp.mean((x @ w).astype(FULL)) + jnp.sum(x.astype(FULL) ** 2) * 0 + penalty


def normed_residual(x, w):
    wide = x.astype(FULL)
    normed = wide / jnp.sqrt(jnp.sum(wide**2, -1, keepdims=True))
    return normed + (x @ w).astype(FULL)
