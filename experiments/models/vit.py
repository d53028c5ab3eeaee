"""The Vision Transformer, arXiv:2010.11929."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class EncoderBlock(nn.Module):
    """Self-attention and an MLP with exact GELU, each normalized before.

    Attributes:
      num_heads: heads of the attention.
      num_hidden: hidden units of the MLP.
      dtype: the dtype to compute in; None for float32.
    """

    num_heads: int
    num_hidden: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, T, D) for x (B, T, D)."""
        y = nn.LayerNorm(dtype=self.dtype)(x)
        attention = nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype)
        x = x + attention(y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.Dense(self.num_hidden, dtype=self.dtype)(y)
        y = nn.gelu(y, approximate=False)
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class ViT(nn.Module):
    """Patches, a class token, position embeddings, encoder blocks; ViT-B/16.

    Attributes:
      patch_size: pixels along a side of a patch.
      width: units of a token.
      num_layers: number of encoder blocks.
      num_heads: heads of the attention.
      num_classes: units of the last dense layer.
      dtype: the dtype to compute in; None for float32.
    """

    patch_size: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_classes: int = 1000
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits (B, num_classes) for images (B, H, W, C)."""
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.width, patch, patch, padding="VALID", dtype=self.dtype)(x)
        x = x.reshape(len(x), -1, self.width)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        token = jnp.broadcast_to(token, (len(x), 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([token, x], axis=1)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width)
        )
        x = x + positions.astype(x.dtype)
        for _ in range(self.num_layers):
            x = EncoderBlock(self.num_heads, 4 * self.width, self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x[:, 0])
