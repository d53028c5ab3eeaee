"""From the outputs of SSD to objects: non-maximum suppression, with fixed shapes.

B denotes the batch size, A default boxes, C classes of objects, K candidates of a
class, D detections of an image.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experiments.data.detection.boxes import overlaps
from experiments.models.ssd.offsets import decode

MIN_SCORE, MAX_OVERLAP = 0.01, 0.45  # arXiv:1512.02325, section 3.7


class Detections(NamedTuple):
    """The objects found in images, those of the highest score first.

    Attributes:
      boxes: as corners (B, D, 4), in shares of the image, within it.
      scores: probabilities (B, D); 0 for padding.
      labels: classes int32 (B, D), from 1; 0 for padding.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array


def detect(
    offsets: jax.Array,
    logits: jax.Array,
    anchors: jax.Array,
    *,
    num_candidates: int = 100,
    max_detections: int = 100,
) -> Detections:
    """Returns the objects that the network finds.

    Args:
      offsets: (B, A, 4), float32.
      logits: (B, A, C + 1), float32, of background first.
      anchors: default boxes, as centers (A, 4).
      num_candidates: K, the boxes of each class that are compared with each other.
      max_detections: D, at most C * K.
    """
    boxes = jnp.clip(decode(offsets, anchors), 0, 1)
    scores = jnp.swapaxes(jax.nn.softmax(logits)[..., 1:], 1, 2)  # (B, C, A)
    num_classes = scores.shape[1]
    num_candidates = min(num_candidates, boxes.shape[1])
    max_detections = min(max_detections, num_classes * num_candidates)
    scores, index = lax.top_k(scores, num_candidates)
    candidates = jax.vmap(lambda boxes, index: boxes[index])(boxes, index)
    keep = jax.vmap(jax.vmap(suppress))(candidates, scores)
    scores = jnp.where(keep & (scores > MIN_SCORE), scores, 0)
    scores, index = lax.top_k(scores.reshape(len(scores), -1), max_detections)
    flat = candidates.reshape(len(scores), -1, 4)
    labels = jnp.where(scores > 0, index // num_candidates + 1, 0)
    found = jnp.take_along_axis(flat, index[..., None], axis=1)
    return Detections(found, scores, labels.astype(jnp.int32))


def suppress(
    boxes: jax.Array, scores: jax.Array, *, max_overlap: float = MAX_OVERLAP
) -> jax.Array:
    """Returns which boxes of a class to keep, bool (K,).

    From the highest score on, a box that is kept suppresses those that overlap it more.

    Args:
      boxes: as corners (K, 4).
      scores: (K,), in descending order.
      max_overlap: intersection over union that is allowed.
    """
    later = jnp.arange(len(scores))[None] > jnp.arange(len(scores))[:, None]
    suppressed = (overlaps(boxes, boxes) > max_overlap) & later

    def visit(i, keep):
        return keep & ~(suppressed[i] & keep[i])

    return lax.fori_loop(0, len(scores), visit, jnp.ones(scores.shape, bool))
