"""Attention functions that a transformer can be given.

Each takes query (B, T, H, D), key and value (B, T, K, D), where B denotes the batch
size, T tokens, H heads, K the number of heads that keys and values have (H is a
multiple of it) and D the units of a head, and returns (B, T, H, D) in the same dtype.
With `causal`, a token attends to itself and to those before it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]


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


def _causal_mask(query: jax.Array) -> jax.Array:
    length = query.shape[1]
    return jnp.tril(jnp.ones((length, length), bool))
