"""The network of the Keras mixed-precision guide."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Dense layers with relu between them; weights glorot-uniform, as Keras has them.

    It computes in the dtype of its parameters and input, and leaves the softmax, in
    float32, to the loss.

    Attributes:
      num_units: units of each hidden layer.
      num_classes: units of the output layer.
    """

    num_units: Sequence[int] = (4096, 4096)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits (B, num_classes) for inputs (B, ...), which it flattens."""
        x = x.reshape(len(x), -1)
        init = nn.initializers.glorot_uniform()
        for size in self.num_units:
            x = nn.relu(nn.Dense(size, kernel_init=init)(x))
        return nn.Dense(self.num_classes, kernel_init=init)(x)
