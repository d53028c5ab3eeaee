"""The loss of SSD, with hard negative mining: arXiv:1512.02325, section 2.2.

B denotes the batch size, A default boxes, C classes of objects.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from experiments.models.ssd.matching import BACKGROUND, Targets

NEGATIVES_PER_MATCH = 3
# What the sum of losses is divided by: the default boxes that match, as in the paper,
# or all of them.
Normalization = Literal["matches", "anchors"]


class LossSums(NamedTuple):
    """Sums over a batch, float32 at least.

    Attributes:
      localization: smooth L1 loss of the offsets of all matches.
      confidence: cross entropy of the matches and of the hard negatives.
      num_matches: default boxes that stand for an object, int32.
      num_anchors: all default boxes, int32.
    """

    localization: jax.Array
    confidence: jax.Array
    num_matches: jax.Array
    num_anchors: jax.Array


def multibox_sums(offsets: jax.Array, logits: jax.Array, targets: Targets) -> LossSums:
    """Returns the sums of the losses of a batch.

    Args:
      offsets: predicted (B, A, 4); in half they are cast to float32.
      logits: predicted (B, A, C + 1), of background first; likewise.
      targets: of all images: `classes` (B, A), `offsets` (B, A, 4).
    """
    offsets, logits = map(_at_least_float32, (offsets, logits))
    is_match = targets.classes != BACKGROUND
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets.classes)
    is_negative = hard_negatives(losses, is_match)
    confidence = jnp.sum(jnp.where(is_match | is_negative, losses, 0))
    errors = jnp.where(is_match[..., None], offsets - targets.offsets, 0)
    localization = jnp.sum(smooth_l1(errors))
    num_matches = jnp.sum(is_match, dtype=jnp.int32)
    num_anchors = jnp.asarray(is_match.size, jnp.int32)
    return LossSums(localization, confidence, num_matches, num_anchors)


def normalize(
    sums: LossSums,
    losses: jax.Array,
    normalization: Normalization,
    factor: float = 1.0,
) -> jax.Array:
    """Returns a loss per match, 0 without matches; or per default box.

    Args:
      sums: of the batch.
      losses: one of its sums of losses, or both together.
      normalization: what to divide by.
      factor: what to multiply by.

    Raises:
      ValueError: for another normalization.
    """
    if normalization not in get_args(Normalization):
        names = ", ".join(get_args(Normalization))
        raise ValueError(
            f"normalization must be one of {names}, got {normalization!r}."
        )
    num = sums.num_matches if normalization == "matches" else sums.num_anchors
    return factor * losses / jnp.maximum(num, 1)


def hard_negatives(
    losses: jax.Array, is_match: jax.Array, *, ratio: int = NEGATIVES_PER_MATCH
) -> jax.Array:
    """Returns the negatives that count, bool (B, A).

    In each image these are the default boxes without an object whose loss is largest,
    `ratio` times as many as there are matches; of equal ones, the first.

    Args:
      losses: cross entropy of each default box (B, A).
      is_match: whether it stands for an object, bool (B, A).
      ratio: negatives per match.
    """
    losses = jax.lax.stop_gradient(losses)
    order = jnp.argsort(jnp.where(is_match, -jnp.inf, losses), descending=True)
    rank = jnp.argsort(order)
    num_matches = jnp.sum(is_match, axis=1, keepdims=True)
    return (rank < ratio * num_matches) & ~is_match


def smooth_l1(x: jax.Array) -> jax.Array:
    """Returns x**2 / 2 where |x| < 1, and |x| - 1/2 elsewhere (Fast R-CNN)."""
    return optax.huber_loss(x)


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
