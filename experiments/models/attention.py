"""Attention functions that a transformer can be given.

Each takes query (B, T, H, D), key and value (B, T, K, D), where B denotes the batch
size, T tokens, H heads, K the number of heads that keys and values have (H is a
multiple of it) and D the units of a head, and returns (B, T, H, D) in the same dtype.
With `causal`, a token attends to itself and to those before it.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import mpjax

AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]
# Units of a head that cuDNN takes on every GPU that it supports: multiples of 8 up to
# this many.
MAX_CUDNN_DEPTH = 128


def flax_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool
) -> jax.Array:
    """Flax's attention: its softmax is written in the dtype of the query; H = K."""
    mask = _causal_mask(query) if causal else None
    return nn.dot_product_attention(query, key, value, mask=mask)


def einsum_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool
) -> jax.Array:
    """Attention by einsums, with a softmax that is written in float32."""
    batch, length, _, depth = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, depth)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, key) * depth**-0.5
    if causal:
        lowest = jnp.finfo(logits.dtype).min
        logits = jnp.where(_causal_mask(query), logits, lowest)
    weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(query.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


def xla_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool
) -> jax.Array:
    """JAX's own attention, as XLA's operations."""
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, implementation="xla"
    )


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool
) -> jax.Array:
    """JAX's own attention, as cuDNN's fused kernel; it refuses float32."""
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, implementation="cudnn"
    )


def kernel_in_half(
    kernel: Callable[..., jax.Array],
    plain: Callable[..., jax.Array],
    *,
    length_axis: int = 1,
) -> Callable[..., jax.Array]:
    """Returns an attention function that calls cuDNN wherever cuDNN can compute it.

    Under `mpjax.autocast` to half its arguments are cast before it is traced, and in a
    model that casts by hand they are half already. Float32 arrays, as in a float32
    model and where parameters are initialized, go to the plain function, as do shapes
    that the kernel does not take: heads of other than 8, 16, ..., 128 units, and odd
    numbers of tokens, which it refuses in training.

    Args:
      kernel: cuDNN's attention.
      plain: attention with the same arguments in XLA's operations.
      length_axis: axis of the tokens in their first three arguments; the last axis
        holds the units of a head.
    """

    def attend(query: jax.Array, key: jax.Array, *args: Any) -> jax.Array:
        is_half = query.dtype in (jnp.float16, jnp.bfloat16)
        depth = query.shape[-1]
        is_depth_taken = depth % 8 == 0 and depth <= MAX_CUDNN_DEPTH
        is_even = all(x.shape[length_axis] % 2 == 0 for x in (query, key))
        is_taken = is_half and is_depth_taken and is_even
        return (kernel if is_taken else plain)(query, key, *args)

    return mpjax.half_precision(attend)


def _causal_mask(query: jax.Array) -> jax.Array:
    length = query.shape[1]
    return jnp.tril(jnp.ones((length, length), bool))
