"""The CTC loss of padded batches, in float32.

"Connectionist temporal classification", Graves et al., 2006. B denotes the batch size,
T output frames, U labels, C classes, of which 0 is the blank.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import mpjax
from experiments.models.speech.padding import frame_mask, zero_padding

_ctc_loss = mpjax.full_precision(optax.ctc_loss)


class CTCLosses(NamedTuple):
    """The CTC loss of each row of a batch.

    Attributes:
      losses: negative log likelihood, float32 (B,); 0 where there is none.
      is_feasible: bool (B,), whether the row is an utterance with an alignment: it has
        output frames, and at least as many as labels and repeated labels, which need a
        blank between them.
    """

    losses: jax.Array
    is_feasible: jax.Array


def ctc_loss(
    logits: jax.Array, num_outputs: jax.Array, labels: jax.Array, num_labels: jax.Array
) -> CTCLosses:
    """Returns the CTC loss of each row.

    Rows without an alignment, and rows of padding, have loss 0 and gradient 0 whatever
    their logits are; `optax.ctc_loss` gives such a row about 1e5. So do the logits
    behind the end of an utterance.

    Args:
      logits: (B, T, C).
      num_outputs: output frames of each row, int32 (B,); 0 for a row of padding.
      labels: int32 (B, U), not 0 where they are no padding.
      num_labels: labels of each row, int32 (B,).
    """
    repeats = labels[:, 1:] == labels[:, :-1]
    repeats &= frame_mask(num_labels - 1, repeats.shape[1])
    num_needed = num_labels + jnp.sum(repeats, axis=1)
    is_feasible = (num_outputs > 0) & (num_needed <= num_outputs)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # The rows without an alignment get one: no labels, and logits without a gradient.
    logits = zero_padding(logits, jnp.where(is_feasible, num_outputs, 0))
    num_labels = jnp.where(is_feasible, num_labels, 0)
    losses = _ctc_loss(
        logits,
        1.0 - frame_mask(num_outputs, logits.shape[1]),
        labels,
        1.0 - frame_mask(num_labels, labels.shape[1]),
    )
    return CTCLosses(jnp.where(is_feasible, losses, 0), is_feasible)


def mean_ctc_loss(
    logits: jax.Array, num_outputs: jax.Array, labels: jax.Array, num_labels: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean CTC loss of a batch's utterances, and what it is a mean over.

    Args: as in `ctc_loss`.

    Returns:
      The mean over all utterances, those without an alignment counted with loss 0, so
      that batches weighted by their utterances add up; 0 for a batch of padding. And
      `num_utterances` and `num_infeasible`, those of them without an alignment.
    """
    losses, is_feasible = ctc_loss(logits, num_outputs, labels, num_labels)
    is_utterance = num_outputs > 0
    num = jnp.sum(is_utterance)
    counts = {
        "num_utterances": num,
        "num_infeasible": jnp.sum(is_utterance & ~is_feasible),
    }
    return jnp.sum(losses) / jnp.maximum(num, 1), counts
