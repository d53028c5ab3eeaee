"""The sizes of SSD: two small networks for a CPU, and the paper's SSD300.

Nothing here imports JAX, so that flags can be checked before it is.
"""

import dataclasses
import itertools
from typing import Literal, NamedTuple

from experiments.models.ssd.anchors import Level

Preset = Literal["tiny", "small", "ssd300"]


class Extra(NamedTuple):
    """A 1 x 1 and a 3 x 3 convolution behind the trunk, whose output has heads.

    Attributes:
      num_reduced: channels of the first.
      num_channels: channels of the second.
      stride: 2 for a map of half the size; 1, without padding, for two places less.
    """

    num_reduced: int
    num_channels: int
    stride: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The layers of an SSD, and its default boxes.

    The heads' maps are those of `head_stages`, of the fully connected layers turned
    convolutions if there are any, and of `extras`, in this order.

    Attributes:
      image_size: side of the images, in pixels, that the scales are made for.
      num_channels: channels of an image.
      stages: by stage of the trunk the channels of its 3 x 3 convolutions; a max pool
        of 2 x 2 precedes each stage but the first.
      head_stages: indices of the stages whose output has heads; without fully connected
        layers the last is among them.
      fc_channels: channels of VGG's fc6, dilated by 6, and fc7; None for neither.
      extras: further layers.
      scales: sides of the square default boxes, in shares of the image, for each map
        and one more.
      aspect_ratios: for each map, those of its other default boxes.
    """

    image_size: int
    num_channels: int
    stages: tuple[tuple[int, ...], ...]
    head_stages: tuple[int, ...]
    fc_channels: tuple[int, int] | None
    extras: tuple[Extra, ...]
    scales: tuple[float, ...]
    aspect_ratios: tuple[tuple[float, ...], ...]

    def deepened(self, num_convolutions: int) -> "Architecture":
        """Returns the same with further convolutions at the end of each stage."""
        stages = tuple(stage + stage[-1:] * num_convolutions for stage in self.stages)
        return dataclasses.replace(self, stages=stages)

    def map_sizes(self) -> list[int]:
        """Returns how many places a row of each head's map has.

        Raises:
          ValueError: if the image is too small for all of them.
        """
        sizes, size = [], self.image_size
        for stage in range(len(self.stages)):
            size = -(-size // 2) if stage else size
            sizes += [size] if stage in self.head_stages else []
        sizes += [size] if self.fc_channels else []
        for extra in self.extras:
            size = -(-size // 2) if extra.stride == 2 else size - 2
            sizes.append(size)
        if min(sizes) < 1:
            raise ValueError(
                f"images of {self.image_size} pixels are too small: the heads' maps "
                f"would have {sizes} places in a row."
            )
        return sizes

    def levels(self) -> list[Level]:
        """Returns the heads' maps with their default boxes, the largest map first."""
        pairs = itertools.pairwise(self.scales)
        columns = (self.map_sizes(), pairs, self.aspect_ratios)
        return [
            Level(size, *scales, ratios)
            for size, scales, ratios in zip(*columns, strict=True)
        ]


PRESETS: dict[Preset, Architecture] = {
    "tiny": Architecture(
        image_size=64,
        num_channels=1,
        stages=((16,), (32,), (64,)),
        head_stages=(2,),
        fc_channels=None,
        extras=(Extra(32, 64),),
        scales=(0.3, 0.45, 0.6),
        aspect_ratios=((2.0,), (2.0,)),
    ),
    "small": Architecture(
        image_size=64,
        num_channels=1,
        stages=((16,), (32, 32), (64, 64), (96, 96)),
        head_stages=(2, 3),
        fc_channels=None,
        extras=(Extra(48, 96), Extra(48, 96)),
        scales=(0.2, 0.35, 0.5, 0.7, 0.9),
        aspect_ratios=((2.0,), (2.0, 3.0), (2.0, 3.0), (2.0,)),
    ),
    # arXiv:1512.02325, figure 2 and section 3.1, and the configuration of its code for
    # Pascal VOC: 8732 default boxes.
    "ssd300": Architecture(
        image_size=300,
        num_channels=3,
        stages=((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
        head_stages=(3,),
        fc_channels=(1024, 1024),
        extras=(
            Extra(256, 512),
            Extra(128, 256),
            Extra(128, 256, stride=1),
            Extra(128, 256, stride=1),
        ),
        scales=(0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05),
        aspect_ratios=((2.0,), *((2.0, 3.0),) * 3, (2.0,), (2.0,)),
    ),
}
