"""The network of SSD, arXiv:1512.02325, section 2.1: a trunk like VGG's, and heads.

B denotes the batch size, A default boxes, C classes of objects. Convolutions are
followed by relu, but for those of the heads. Weights are normal with variance
2 / fan_in (He), and with deviation 0.01 in the heads; biases are zero. The trunk's
layers have VGG's names: `trunk/conv1_1/kernel`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.pooling import max_filter, max_pool
from experiments.models.ssd.anchors import Level
from experiments.models.ssd.architecture import Architecture

_HE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
FIRST_NORM = 20.0  # of a place's features in the first map, at the start: section 3.1


class Trunk(nn.Module):
    """Stages of 3 x 3 convolutions, and VGG's fully connected layers as convolutions.

    Attributes:
      architecture: the layers.
      dtype: the dtype to compute in; None for that of parameters and input.
    """

    architecture: Architecture
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Returns the heads' maps (B, H, W, D) of images (B, H, W, C)."""
        maps = []
        for i, stage in enumerate(self.architecture.stages):
            x = max_pool(x, ceil=True) if i else x
            for j, num_channels in enumerate(stage):
                name = f"conv{i + 1}_{j + 1}"
                x = nn.relu(_conv(num_channels, 3, name, self.dtype)(x))
            maps += [x] if i in self.architecture.head_stages else []
        if self.architecture.fc_channels is not None:
            fc6, fc7 = self.architecture.fc_channels
            x = max_filter(x)
            x = nn.relu(_conv(fc6, 3, "fc6", self.dtype, kernel_dilation=6)(x))
            x = nn.relu(_conv(fc7, 1, "fc7", self.dtype)(x))
            maps.append(x)
        return maps


class SSD(nn.Module):
    """A single-shot detector.

    Attributes:
      num_classes: C.
      architecture: the layers, and the default boxes.
      dtype: the dtype to compute in; None for that of parameters and input.
    """

    num_classes: int
    architecture: Architecture
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns offsets (B, A, 4) and logits (B, A, C + 1) for images (B, S, S, c).

        They are in the order of `anchors.default_boxes`; the first logit is that of
        background.
        """
        maps = Trunk(self.architecture, self.dtype, name="trunk")(images)
        x = maps[-1]
        maps[0] = L2Norm(name="norm")(maps[0])
        for i, extra in enumerate(self.architecture.extras, start=1):
            x = _conv(extra.num_reduced, 1, f"extra{i}_1", self.dtype)(x)
            options = {"strides": 2} if extra.stride == 2 else {"padding": "VALID"}
            name = f"extra{i}_2"
            x = _conv(extra.num_channels, 3, name, self.dtype, **options)(nn.relu(x))
            x = nn.relu(x)
            maps.append(x)
        levels = self.architecture.levels()
        heads = [
            self._heads(x, level, i)
            for i, (x, level) in enumerate(zip(maps, levels, strict=True))
        ]
        offsets, logits = zip(*heads, strict=True)
        return jnp.concatenate(offsets, axis=1), jnp.concatenate(logits, axis=1)

    def _heads(
        self, x: jax.Array, level: Level, index: int
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the outputs of one map's default boxes."""
        outputs = []
        for name, size in (("offsets", 4), ("classes", self.num_classes + 1)):
            num_channels = level.boxes_per_place * size
            y = nn.Conv(
                num_channels,
                (3, 3),
                kernel_init=nn.initializers.normal(0.01),
                dtype=self.dtype,
                name=f"{name}_{index}",
            )(x)
            outputs.append(y.reshape(len(y), -1, size))
        return outputs[0], outputs[1]


class L2Norm(nn.Module):
    """Gives the features of each place one norm, a parameter by channel: ParseNet's.

    The sum of squares is float32 at least; the output has the dtype of the input.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, H, W, D) for x (B, H, W, D)."""
        init = nn.initializers.constant(FIRST_NORM)
        scale = self.param("scale", init, x.shape[-1:])
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        squares = jnp.sum(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(squares + 1e-6) * scale).astype(x.dtype)


def _conv(num_channels: int, size: int, name: str, dtype: Any, **options: Any):
    return nn.Conv(
        num_channels, (size, size), kernel_init=_HE, dtype=dtype, name=name, **options
    )
