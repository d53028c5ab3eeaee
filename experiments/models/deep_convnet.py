"""DeepConvNet, from "Deep Learning from Scratch", chapter 8."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.pooling import max_pool

CONV_PADDINGS = ((16, 1), (16, 1), (32, 1), (32, 2), (64, 1), (64, 1))


class DeepConvNet(nn.Module):
    """Three times two 3x3 convolutions and a pool, then two dense layers.

    The pools reduce 28 x 28 pixels to 4 x 4 x 64. relu follows each convolution and the
    first dense layer, then dropout. (The book drops half of the logits too, which slows
    training down; here all are kept.) Weights are normal with variance 2 / fan_in (He),
    biases zero. The network computes in the dtype of its parameters and input, and
    leaves the softmax, in float32, to the loss.

    Attributes:
      num_hidden: units of the first dense layer.
      num_classes: units of the last dense layer.
      dropout_rate: share of the hidden units that training sets to zero.
    """

    num_hidden: int = 50
    num_classes: int = 10
    dropout_rate: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns logits (B, num_classes) for images (B, H, W) or (B, H, W, C).

        Args:
          x: the images.
          train: whether to drop units; needs a PRNG key named `dropout`.
        """
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        x = x[..., None] if x.ndim == 3 else x
        for index, (num_channels, padding) in enumerate(CONV_PADDINGS):
            # On CPU a convolution that pads by 2 itself has a gradient 20 times slower.
            x = _pad(x, padding - 1)
            x = nn.relu(nn.Conv(num_channels, (3, 3), padding=1, kernel_init=init)(x))
            x = max_pool(x) if index % 2 else x
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(self.num_hidden, kernel_init=init)(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=init)(x)


def _pad(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (width, width), (width, width), (0, 0)))
