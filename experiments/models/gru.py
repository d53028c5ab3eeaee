"""A recurrent network that predicts the next elements of a sequence."""

from typing import Any

import flax.linen as nn
import jax


class GRU(nn.Module):
    """One GRU layer over time and a Dense layer at each step.

    Attributes:
      num_units: units of the GRU.
      num_outputs: units of the Dense layer.
    """

    num_units: int
    num_outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits (B, T, num_outputs) for inputs (B, T, num_features)."""
        hidden: Any = nn.RNN(nn.GRUCell(self.num_units))(x)
        return nn.Dense(self.num_outputs)(hidden)
