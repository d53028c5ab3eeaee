"""A speech recognizer like Deep Speech 2, arXiv:1512.02595."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class BiGRU(nn.Module):
    """A GRU forward in time and another backward, their outputs side by side.

    Attributes:
      num_units: units of each.
      dtype: the dtype to compute in; None for float32.
    """

    num_units: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, T, 2 * num_units) for x (B, T, D)."""
        forward, backward = (
            nn.RNN(nn.GRUCell(self.num_units, dtype=self.dtype)) for _ in range(2)
        )
        # GRUCell's own first carry is float32, which would make all others float32.
        carry = jnp.zeros((len(x), self.num_units), self.dtype or jnp.float32)
        outputs: Any = nn.Bidirectional(forward, backward)(
            x, initial_carry=(carry, carry)
        )
        return outputs


class DeepSpeech(nn.Module):
    """Convolutions over time and frequency, bidirectional GRUs, and a dense layer.

    BatchNorm precedes each GRU; its running mean and variance are the model state.

    Attributes:
      num_channels: channels of the two convolutions.
      num_units: units of each direction of a GRU.
      num_layers: number of bidirectional GRUs.
      num_classes: characters, and the blank of CTC.
      dtype: the dtype to compute in; None for float32.
    """

    num_channels: int = 32
    num_units: int = 768
    num_layers: int = 5
    num_classes: int = 29
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        """Returns logits (B, T / 2, num_classes) for spectrograms (B, T, F).

        Args:
          x: the spectrograms, of T frames and F frequencies.
          train: whether BatchNorm uses the statistics of the batch.
        """

        def norm(x):
            return nn.BatchNorm(
                use_running_average=not train, momentum=0.9, dtype=self.dtype
            )(x)

        x = x[..., None]
        for size, strides in (((11, 41), (2, 2)), ((11, 21), (1, 2))):
            x = nn.Conv(
                self.num_channels, size, strides, use_bias=False, dtype=self.dtype
            )(x)
            x = jnp.clip(norm(x), 0, 20)
        x = x.reshape(*x.shape[:2], -1)
        for _ in range(self.num_layers):
            x = BiGRU(self.num_units, self.dtype)(norm(x))
        return nn.Dense(self.num_classes, dtype=self.dtype)(norm(x))
