"""The diffusion U-Net of "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239).

It predicts the noise in an image at a time of the diffusion.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def embed_time(time: jax.Array, width: int) -> jax.Array:
    """Returns sines and cosines (B, width) of times (B,), float32, as transformers."""
    half = width // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = time.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ResidualBlock(nn.Module):
    """Two times GroupNorm, swish and 3x3 convolution, with the time in between.

    Attributes:
      num_channels: channels of the output.
      dtype: the dtype to compute in; None for float32.
    """

    num_channels: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """Returns (B, H, W, num_channels) for x (B, H, W, C) and time (B, E)."""
        dtype = self.dtype
        y = nn.swish(nn.GroupNorm(dtype=dtype)(x))
        y = nn.Conv(self.num_channels, (3, 3), dtype=dtype)(y)
        shift = nn.Dense(self.num_channels, dtype=dtype)(nn.swish(time))
        y = y + shift[:, None, None]
        y = nn.swish(nn.GroupNorm(dtype=dtype)(y))
        y = nn.Conv(self.num_channels, (3, 3), dtype=dtype)(y)
        if x.shape[-1] != self.num_channels:
            x = nn.Conv(self.num_channels, (1, 1), dtype=dtype)(x)
        return x + y


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, added to the input.

    Attributes:
      num_heads: heads of the attention.
      dtype: the dtype to compute in; None for float32.
    """

    num_heads: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, H, W, C) for x (B, H, W, C)."""
        pixels = x.reshape(len(x), -1, x.shape[-1])
        y = nn.GroupNorm(dtype=self.dtype)(pixels)
        y = nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype)(y)
        return (pixels + y).reshape(x.shape)


class UNet(nn.Module):
    """Residual blocks on ever smaller images, then on ever larger, with skips.

    Attributes:
      num_channels: channels of the first level; a multiple of 32, for GroupNorm.
      multipliers: the levels' channels, as multiples of `num_channels`.
      num_blocks: residual blocks of a level on the way down; one more on the way up.
      attention_sizes: heights of the images on which there is self-attention.
      dtype: the dtype to compute in; None for float32.
    """

    num_channels: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 4)
    num_blocks: int = 2
    attention_sizes: Sequence[int] = (16,)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """Returns noise (B, H, W, C) for images (B, H, W, C) and times (B,)."""
        dtype = self.dtype
        num_outputs = x.shape[-1]
        time = embed_time(time, self.num_channels)
        time = nn.Dense(4 * self.num_channels, dtype=dtype)(time)
        time = nn.Dense(4 * self.num_channels, dtype=dtype)(nn.swish(time))
        x = nn.Conv(self.num_channels, (3, 3), dtype=dtype)(x)
        x, skips = self._down(x, time)
        x = ResidualBlock(x.shape[-1], dtype)(x, time)
        x = AttentionBlock(dtype=dtype)(x)
        x = ResidualBlock(x.shape[-1], dtype)(x, time)
        x = self._up(x, skips, time)
        x = nn.swish(nn.GroupNorm(dtype=dtype)(x))
        return nn.Conv(num_outputs, (3, 3), dtype=dtype)(x)

    def _down(self, x: jax.Array, time: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        skips = [x]
        for level, multiplier in enumerate(self.multipliers):
            if level > 0:
                x = nn.Conv(x.shape[-1], (3, 3), (2, 2), dtype=self.dtype)(x)
                skips.append(x)
            for _ in range(self.num_blocks):
                x = self._block(x, time, multiplier)
                skips.append(x)
        return x, skips

    def _up(self, x: jax.Array, skips: list[jax.Array], time: jax.Array) -> jax.Array:
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for _ in range(self.num_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._block(x, time, multiplier)
            if level > 0:
                batch, height, width, num_channels = x.shape
                larger = (batch, 2 * height, 2 * width, num_channels)
                x = jax.image.resize(x, larger, "nearest")
                x = nn.Conv(num_channels, (3, 3), dtype=self.dtype)(x)
        return x

    def _block(self, x: jax.Array, time: jax.Array, multiplier: int) -> jax.Array:
        x = ResidualBlock(multiplier * self.num_channels, self.dtype)(x, time)
        if x.shape[1] in self.attention_sizes:
            x = AttentionBlock(dtype=self.dtype)(x)
        return x
