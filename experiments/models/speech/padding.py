"""Padding: which frames of a batch are real, and a BatchNorm of these alone.

B denotes the batch size, T the frames of the longest utterance, D features.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def frame_mask(num_frames: jax.Array, length: int) -> jax.Array:
    """Returns bool (B, length): whether a frame is before its utterance's end.

    Args:
      num_frames: frames of each utterance, int32 (B,); 0 for a row of padding.
      length: frames of the padded batch.
    """
    return jnp.arange(length) < num_frames[:, None]


def zero_padding(x: jax.Array, num_frames: jax.Array) -> jax.Array:
    """Returns x (B, T, ...) with zeros behind each utterance's end.

    Whatever stood there, NaN included, has no effect and gets a zero gradient.
    """
    mask = frame_mask(num_frames, x.shape[1])
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)


class MaskedBatchNorm(nn.Module):
    """BatchNorm whose statistics are those of the real frames, in float32.

    A batch of padding alone has mean and variance 0, not NaN.

    Attributes:
      momentum: decay of the running mean and variance.
    """

    momentum: float = 0.9

    @nn.compact
    def __call__(
        self, x: jax.Array, num_frames: jax.Array, *, train: bool
    ) -> jax.Array:
        """Returns x (B, T, ..., D), normalized, with zeros behind the ends.

        Args:
          x: activations; zeros behind each end.
          num_frames: frames of each utterance, int32 (B,).
          train: whether to use the statistics of the batch.
        """
        mask = frame_mask(num_frames, x.shape[1])
        counted = mask | ~jnp.any(mask)
        counted = counted.reshape(*mask.shape, *(1,) * (x.ndim - 2))
        norm = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)
        return zero_padding(norm(x, mask=counted), num_frames)
