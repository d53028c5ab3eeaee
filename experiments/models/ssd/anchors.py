"""Default boxes, on feature maps of several sizes: arXiv:1512.02325, section 2.2."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Level(NamedTuple):
    """A feature map, and the default boxes at each of its places.

    Attributes:
      size: places in a row, and rows.
      scale: side of the square box, in shares of the image.
      next_scale: that of the next level, for a second square between the two.
      aspect_ratios: width by height of the other boxes; each is there upright, too.
    """

    size: int
    scale: float
    next_scale: float
    aspect_ratios: tuple[float, ...]

    @property
    def boxes_per_place(self) -> int:
        """How many default boxes a place has."""
        return 2 + 2 * len(self.aspect_ratios)

    def sizes(self) -> list[tuple[float, float]]:
        """Returns width and height of the boxes of a place, in order."""
        between = math.sqrt(self.scale * self.next_scale)
        squares = [(self.scale, self.scale), (between, between)]
        roots = [math.sqrt(ratio) for ratio in self.aspect_ratios]
        both = itertools.chain.from_iterable((r, 1 / r) for r in roots)
        return squares + [(self.scale * r, self.scale / r) for r in both]


def default_boxes(levels: Sequence[Level]) -> np.ndarray:
    """Returns the default boxes (A, 4) of all levels, as centers, float32.

    They are ordered by level, row, place in the row, and box, as the outputs of the
    network are, and may reach beyond the image.
    """
    boxes = []
    for level in levels:
        places = (np.arange(level.size) + 0.5) / level.size
        y, x = np.meshgrid(places, places, indexing="ij")
        centers = np.stack([x, y], axis=-1)[:, :, None]
        sizes = np.asarray(level.sizes())
        shape = (level.size, level.size, len(sizes), 2)
        both = [np.broadcast_to(part, shape) for part in (centers, sizes)]
        boxes.append(np.concatenate(both, axis=-1).reshape(-1, 4))
    return np.concatenate(boxes).astype(np.float32)


def level_of(levels: Sequence[Level]) -> np.ndarray:
    """Returns the index (A,) of each default box's level."""
    counts = [level.size**2 * level.boxes_per_place for level in levels]
    return np.repeat(np.arange(len(levels)), counts)
