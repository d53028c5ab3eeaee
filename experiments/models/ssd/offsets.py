"""What SSD predicts of a box, beside a default box: arXiv:1512.02325, section 2.2."""

import jax
import jax.numpy as jnp

from experiments.data.detection.boxes import to_centers, to_corners

# What the offsets of position and of size are divided by, in the paper's code.
POSITION_VARIANCE, SIZE_VARIANCE = 0.1, 0.2
# Width and height of a padded box, so that its logarithm is finite.
_SMALLEST = 1e-6


def encode(corners: jax.Array, anchors: jax.Array) -> jax.Array:
    """Returns what the network is to predict of boxes, beside default boxes.

    Args:
      corners: boxes (..., 4).
      anchors: the default box of each, as centers (..., 4).

    Returns:
      Offsets (..., 4): of the center, in sizes of the default box, and the logarithm of
      the ratio of sizes, each divided by its variance; finite for boxes without area.
    """
    boxes = to_centers(corners)
    position = (boxes[..., :2] - anchors[..., :2]) / anchors[..., 2:]
    size = jnp.log(jnp.maximum(boxes[..., 2:], _SMALLEST) / anchors[..., 2:])
    scaled = [position / POSITION_VARIANCE, size / SIZE_VARIANCE]
    return jnp.concatenate(scaled, axis=-1)


def decode(offsets: jax.Array, anchors: jax.Array) -> jax.Array:
    """Returns boxes as corners (..., 4): the inverse of `encode`."""
    position = offsets[..., :2] * POSITION_VARIANCE * anchors[..., 2:]
    size = jnp.exp(offsets[..., 2:] * SIZE_VARIANCE) * anchors[..., 2:]
    return to_corners(jnp.concatenate([anchors[..., :2] + position, size], axis=-1))
