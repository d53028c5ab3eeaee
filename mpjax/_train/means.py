"""Means of gradients, loss and aux over the pieces of a batch and over devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpjax._tree import is_inexact, sum_of_squares


class Gradients(NamedTuple):
    """Gradients, loss and other results of one pass over a batch.

    Attributes:
      scaled: like the trained parameters; gradients of the scaled loss, float32 at
        least, zero for integer parameters.
      squares: float32 scalar, the sum of their squares.
      loss: float32 scalar, unscaled.
      model_state: new model state, in the dtypes of the old.
      aux: auxiliary outputs of the loss.
      weight: float32 scalar, what the whole batch weighs; None without weights.
    """

    scaled: Any
    squares: jax.Array
    loss: jax.Array
    model_state: Any
    aux: Any
    weight: jax.Array | None = None


class Share(NamedTuple):
    """What a piece counts.

    Attributes:
      share: float32, the weight of the piece over that of all pieces and devices; NaN
        for a weight that is negative or not finite.
      is_counted: bool, whether the piece weighs something on any device.
    """

    share: jax.Array
    is_counted: jax.Array


class Weights(NamedTuple):
    """What the pieces of a batch count.

    Attributes:
      of_pieces: a `Share` of arrays (num,), for the pieces on this device.
      of_device: a `Share` of scalars, for all of this device.
      total: float32 scalar, the weight of all pieces and devices.
    """

    of_pieces: Share
    of_device: Share
    total: jax.Array


def weigh_pieces(
    loss_weight: Callable[[Any], Any], pieces: Any, num: int, axis_name: Any
) -> Weights:
    """Returns what each piece of a batch counts.

    Args:
      loss_weight: `batch -> scalar`.
      pieces: arrays (num, ...); for `num` 1, the batch as it is.
      num: number of pieces.
      axis_name: axes of the surrounding `shard_map`, or None.

    Raises:
      ValueError: if a weight is not a scalar.
    """

    def weight_of(batch):
        weight = jnp.asarray(loss_weight(batch))
        if weight.shape != ():
            raise ValueError(
                "loss_weight(batch) must return one number, how much the loss of a "
                f"batch counts, such as mask.sum(), got shape {weight.shape}."
            )
        weight = weight.astype(jnp.float32)
        return jnp.where(weight >= 0, weight, jnp.nan)

    weights = weight_of(pieces)[None] if num == 1 else jax.lax.map(weight_of, pieces)
    everywhere = weights if axis_name is None else jax.lax.psum(weights, axis_name)
    total = everywhere.sum()
    shares = weights / jnp.where(total == 0, 1, total)
    return Weights(
        Share(shares, everywhere != 0), Share(shares.sum(), total != 0), total
    )


def weigh(out: Gradients, share: Share, old_model_state: Any) -> Gradients:
    """Multiplies the results of a piece by its share; of share 0, they are selected.

    So an Inf or NaN of a piece that counts nothing disappears, and its model state is
    the old one. A model state's integers, which are alike on all devices, change if the
    piece counts on any.
    """
    is_zero = share.share == 0

    def times(x):
        x = jnp.asarray(x)
        x = x * share.share if is_inexact(x) else x
        return jnp.where(is_zero, jnp.zeros_like(x), x)

    def keep(new, old):
        return jnp.where(~is_zero if is_inexact(old) else share.is_counted, new, old)

    return Gradients(
        scaled=jax.tree.map(times, out.scaled),
        squares=times(out.squares),
        loss=times(out.loss),
        model_state=jax.tree.map(keep, out.model_state, old_model_state),
        aux=jax.tree.map(times, out.aux),
    )


def mean_over_devices(
    out: Gradients, axis_name: Any, weights: Weights | None
) -> Gradients:
    """Averages over devices; integer aux is added up, and so are weighted results.

    Args:
      out: the results of one device; with weights, already multiplied by them, except
        the model state.
      axis_name: axes of the surrounding `shard_map`.
      weights: what the devices count; None if all count alike.
    """

    def mean(x):
        return jax.lax.pmean(x, axis_name) if is_inexact(x) else x

    def total(x):
        return jax.lax.psum(x, axis_name)

    combine = mean if weights is None else total
    combine_state = mean
    if weights is not None:
        share = weights.of_device.share

        def combine_state(x):
            if not is_inexact(x):
                return x
            return total(jnp.where(share == 0, 0, x * share)).astype(x.dtype)

    scaled = jax.tree.map(combine, out.scaled)
    return Gradients(
        scaled=scaled,
        squares=sum_of_squares(scaled),
        loss=combine(out.loss),
        model_state=jax.tree.map(combine_state, out.model_state),
        aux=jax.tree.map(lambda x: combine(x) if is_inexact(x) else total(x), out.aux),
    )
