"""GPT-2, from "Language Models are Unsupervised Multitask Learners" (Radford, 2019)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.attention import AttentionFn, flax_attention

_init = nn.initializers.normal(0.02)


class Block(nn.Module):
    """Causal self-attention and an MLP with GELU, each normalized before.

    Attributes:
      num_heads: heads of the attention.
      tanh_gelu: whether GELU is its tanh approximation.
      attention: `(query, key, value, causal) -> output`.
      dtype: the dtype to compute in; None for float32.
    """

    num_heads: int
    tanh_gelu: bool = False
    attention: AttentionFn = flax_attention
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, T, D) for x (B, T, D)."""
        width = x.shape[-1]
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.Dense(3 * width, kernel_init=_init, dtype=self.dtype)(y)
        heads = (*y.shape[:2], self.num_heads, width // self.num_heads)
        query, key, value = (z.reshape(heads) for z in jnp.split(y, 3, axis=-1))
        y = self.attention(query, key, value, True).reshape(x.shape)
        x = x + nn.Dense(width, kernel_init=_init, dtype=self.dtype)(y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.Dense(4 * width, kernel_init=_init, dtype=self.dtype)(y)
        y = nn.gelu(y, approximate=self.tanh_gelu)
        return x + nn.Dense(width, kernel_init=_init, dtype=self.dtype)(y)


class _ScannedBlock(Block):
    """A block as `nn.scan` calls it: with a carry, and outputs per layer."""

    def __call__(self, x: jax.Array) -> Any:
        return super().__call__(x), None


class GPT2(nn.Module):
    """Token and position embeddings, blocks, and logits by the token embeddings.

    Attributes:
      vocabulary_size: number of tokens that exist.
      max_length: number of positions.
      width: units of a token.
      num_layers: number of blocks.
      num_heads: heads of the attention.
      tanh_gelu: whether GELU is its tanh approximation, as OpenAI's.
      scan: whether the blocks are a `scan` over their stacked parameters.
      remat: whether the backward pass rematerializes each block.
      attention: `(query, key, value, causal) -> output`.
      dtype: the dtype to compute in; None for float32.
    """

    vocabulary_size: int = 50257
    max_length: int = 1024
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    tanh_gelu: bool = False
    scan: bool = False
    remat: bool = False
    attention: AttentionFn = flax_attention
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits (B, T, vocabulary_size) for tokens int32 (B, T)."""
        embed = nn.Embed(
            self.vocabulary_size, self.width, embedding_init=_init, dtype=self.dtype
        )
        positions = nn.Embed(
            self.max_length, self.width, embedding_init=_init, dtype=self.dtype
        )
        x = embed(tokens) + positions(jnp.arange(tokens.shape[1]))
        x = self._blocks(x)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x))

    def _blocks(self, x: jax.Array) -> jax.Array:
        block: Any = _ScannedBlock if self.scan else Block
        if self.remat:
            # A scan keeps XLA from merging what is rematerialized with the original.
            block = nn.remat(block, prevent_cse=not self.scan)
        fields = (self.num_heads, self.tanh_gelu, self.attention, self.dtype)
        if self.scan:
            stacked = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.num_layers,
            )
            return stacked(*fields)(x)[0]
        for _ in range(self.num_layers):
            x = block(*fields)(x)
        return x
