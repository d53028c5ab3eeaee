"""Depthwise convolutions over time: lookahead row convolution, and the function.

The row convolution is the one of "Deep Speech 2", arXiv:1512.02595, section 3.7. B
denotes the batch size, T time, D features, K taps.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.speech.padding import zero_padding


class RowConv(nn.Module):
    """Lets a network that runs forward in time see a few frames ahead.

    The output at t is the sum over j = 0, ..., lookahead of kernel[j] * x[t + j],
    feature by feature. Frames behind an utterance's end count as zeros.

    Attributes:
      lookahead: frames that are seen ahead.
    """

    lookahead: int

    @nn.compact
    def __call__(self, x: jax.Array, num_frames: jax.Array) -> jax.Array:
        """Returns (B, T, D) for x (B, T, D) and num_frames int32 (B,)."""
        shape = (self.lookahead + 1, x.shape[-1])
        kernel = self.param("kernel", _init_taps, shape)
        x = zero_padding(x, num_frames)
        return zero_padding(depthwise_conv(x, kernel, 0), num_frames)


def depthwise_conv(x: jax.Array, kernel: jax.Array, num_before: int) -> jax.Array:
    """Returns a convolution over time of each feature with its own taps.

    It is written as a sum of shifted products, which XLA fuses into one loop.

    Args:
      x: (B, T, D); zeros are put before and after it.
      kernel: (K, D).
      num_before: taps that are on frames before the output's own.

    Returns:
      (B, T, D).
    """
    num_taps, length = len(kernel), x.shape[1]
    padded = jnp.pad(x, ((0, 0), (num_before, num_taps - 1 - num_before), (0, 0)))
    return sum(
        (padded[:, j : j + length] * kernel[j] for j in range(1, num_taps)),
        start=padded[:, :length] * kernel[0],
    )


def _init_taps(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """Initializes (K, D) with the variance 1 / K."""
    return jax.random.normal(key, shape, dtype) * shape[0] ** -0.5
