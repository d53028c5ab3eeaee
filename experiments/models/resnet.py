"""ResNet v1.5, from "Deep Residual Learning for Image Recognition", arXiv:1512.03385.

In v1.5 the 3x3 convolution of a block has its stride, not the first 1x1.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with BatchNorm, added to the input.

    Attributes:
      num_channels: channels of the 3x3 convolution; the output has four times as many.
      stride: of the 3x3 convolution.
      dtype: the dtype to compute in; None for float32.
    """

    num_channels: int
    stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        """Returns (B, H / stride, W / stride, 4 * num_channels) for x (B, H, W, C)."""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        strides = (self.stride, self.stride)
        y = nn.relu(norm()(conv(self.num_channels, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.num_channels, (3, 3), strides)(y)))
        y = conv(4 * self.num_channels, (1, 1))(y)
        # The block begins as the identity.
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = norm()(conv(4 * self.num_channels, (1, 1), strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A 7x7 convolution, a pool, stages of bottlenecks, and a dense layer.

    BatchNorm's running mean and variance are its model state, in `batch_stats`.

    Attributes:
      num_blocks: bottlenecks of each stage; ResNet-50 by default.
      num_channels: channels of the first stage; each stage has twice as many.
      num_classes: units of the dense layer.
      dtype: the dtype to compute in; None for float32.
    """

    num_blocks: Sequence[int] = (3, 4, 6, 3)
    num_channels: int = 64
    num_classes: int = 1000
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        """Returns logits (B, num_classes) for images (B, H, W, C).

        Args:
          x: the images.
          train: whether BatchNorm uses the statistics of the batch.
        """
        x = nn.Conv(
            self.num_channels, (7, 7), (2, 2), use_bias=False, dtype=self.dtype
        )(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(
            x
        )
        x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), padding="SAME")
        for stage, num_blocks in enumerate(self.num_blocks):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                num_channels = self.num_channels * 2**stage
                x = Bottleneck(num_channels, stride, self.dtype)(x, train=train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)
