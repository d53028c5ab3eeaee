"""Llama: RMSNorm, rotary embeddings, SwiGLU, grouped-query attention.

"LLaMA: Open and Efficient Foundation Language Models", arXiv:2302.13971; the keys and
values of fewer heads are those of Llama 2, arXiv:2307.09288.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.attention import AttentionFn, einsum_attention


def rotate(x: jax.Array, *, base: float = 10_000.0) -> jax.Array:
    """Rotates pairs of units by angles that grow with the position (RoPE).

    Args:
      x: queries or keys (B, T, H, D).
      base: the slowest of the D / 2 angles grows by about 1 / base per position.

    Returns:
      An array of the same shape and dtype; sines and cosines are float32.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Block(nn.Module):
    """Causal grouped-query attention and a SwiGLU MLP, each normalized before.

    Attributes:
      num_heads: heads of the queries.
      num_kv_heads: heads of the keys and values.
      num_hidden: hidden units of the MLP.
      attention: `(query, key, value, causal) -> output`.
      dtype: the dtype to compute in; None for float32.
    """

    num_heads: int
    num_kv_heads: int
    num_hidden: int
    attention: AttentionFn = einsum_attention
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, T, D) for x (B, T, D)."""
        x = x + self._attend(nn.RMSNorm(dtype=self.dtype)(x))
        return x + self._mlp(nn.RMSNorm(dtype=self.dtype)(x))

    def _attend(self, x: jax.Array) -> jax.Array:
        depth = x.shape[-1] // self.num_heads

        def heads(num_heads, name):
            return nn.DenseGeneral(
                (num_heads, depth), use_bias=False, dtype=self.dtype, name=name
            )(x)

        query = rotate(heads(self.num_heads, "query"))
        key = rotate(heads(self.num_kv_heads, "key"))
        value = heads(self.num_kv_heads, "value")
        return nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), use_bias=False, dtype=self.dtype, name="out"
        )(self.attention(query, key, value, True))

    def _mlp(self, x: jax.Array) -> jax.Array:
        def dense(num_units, name):
            return nn.Dense(num_units, use_bias=False, dtype=self.dtype, name=name)

        gate = nn.silu(dense(self.num_hidden, "gate")(x))
        return dense(x.shape[-1], "down")(gate * dense(self.num_hidden, "up")(x))


class Llama(nn.Module):
    """Token embeddings, blocks, RMSNorm, and a dense layer to logits.

    Attributes:
      vocabulary_size: number of tokens that exist.
      width: units of a token.
      num_layers: number of blocks.
      num_heads: heads of the queries.
      num_kv_heads: heads of the keys and values.
      num_hidden: hidden units of an MLP.
      attention: `(query, key, value, causal) -> output`.
      dtype: the dtype to compute in; None for float32.
    """

    vocabulary_size: int = 32_000
    width: int = 1024
    num_layers: int = 8
    num_heads: int = 16
    num_kv_heads: int = 4
    num_hidden: int = 2816
    attention: AttentionFn = einsum_attention
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits (B, T, vocabulary_size) for tokens int32 (B, T)."""
        x = nn.Embed(self.vocabulary_size, self.width, dtype=self.dtype)(tokens)
        for _ in range(self.num_layers):
            x = Block(
                self.num_heads,
                self.num_kv_heads,
                self.num_hidden,
                self.attention,
                self.dtype,
            )(x)
        x = nn.RMSNorm(dtype=self.dtype)(x)
        return nn.Dense(self.vocabulary_size, use_bias=False, dtype=self.dtype)(x)
