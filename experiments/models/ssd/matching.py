"""Which default boxes stand for which object, and what they are to predict.

Source: SSD, arXiv:1512.02325, section 2.2, "Matching strategy". A denotes the number of
default boxes, M of objects, padding included.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import mpjax
from experiments.data.detection.boxes import overlaps, to_corners
from experiments.models.ssd.offsets import encode

THRESHOLD = 0.5
BACKGROUND = 0  # its class; those of objects are 1, 2, ...
NO_OBJECT = -1


class Targets(NamedTuple):
    """What the default boxes of an image are to predict.

    Attributes:
      classes: int32 (A,); 0 for background.
      offsets: (A, 4), as `boxes.encode` makes them; of no meaning for background.
    """

    classes: jax.Array
    offsets: jax.Array


def make_batch_targets(anchors: Any) -> Callable[..., Targets]:
    """Returns `(boxes, labels, mask) -> Targets` for batches, in float32 everywhere.

    Args:
      anchors: default boxes, as centers (A, 4).
    """
    anchors = jnp.asarray(anchors)
    make = lambda *objects: make_targets(anchors, *objects)
    return mpjax.full_precision(jax.vmap(make))


def make_targets(
    anchors: jax.Array, boxes: jax.Array, labels: jax.Array, mask: jax.Array
) -> Targets:
    """Returns what the default boxes of one image are to predict.

    Args:
      anchors: default boxes, as centers (A, 4).
      boxes: of the objects, as corners (M, 4).
      labels: classes of the objects, int32 (M,), from 1.
      mask: bool (M,), False for padding.
    """
    matches = match(overlaps(to_corners(anchors), boxes), mask)
    is_match = matches != NO_OBJECT
    chosen = jnp.where(is_match, matches, 0)
    classes = jnp.where(is_match, labels[chosen], BACKGROUND)
    return Targets(classes.astype(jnp.int32), encode(boxes[chosen], anchors))


def match(
    shares: jax.Array, mask: jax.Array, *, threshold: float = THRESHOLD
) -> jax.Array:
    """Returns for each default box the object that it stands for, int32 (A,), or -1.

    Each object gets the default box that overlaps it most. Where two want the same, the
    larger overlap has it, and the other takes the best that is free. Every other
    default box stands for the object that it overlaps most, if by more than the
    threshold.

    Args:
      shares: intersection over union (A, M).
      mask: bool (M,), False for padding.
      threshold: the overlap to exceed.
    """
    num_anchors, num_objects = shares.shape
    shares = jnp.where(mask, shares, -1)
    best = jnp.argmax(shares, axis=1).astype(jnp.int32)
    enough = jnp.max(shares, axis=1) > threshold
    matches = jnp.where(enough, best, NO_OBJECT)

    def assign(_, carry):
        """Gives the largest overlap left its default box and its object."""
        matches, left = carry
        anchor, wanted = jnp.divmod(jnp.argmax(left), num_objects)
        is_left = left[anchor, wanted] > 0
        here = (jnp.arange(num_anchors) == anchor) & is_left
        there = (jnp.arange(num_objects) == wanted) & is_left
        matches = jnp.where(here, wanted.astype(jnp.int32), matches)
        return matches, jnp.where(here[:, None] | there, -1, left)

    matches, _ = lax.fori_loop(0, num_objects, assign, (matches, shares))
    return matches
