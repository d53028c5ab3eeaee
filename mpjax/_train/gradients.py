"""Scaled gradients of a loss, cast by policy, accumulated over microbatches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpjax._autocast import autocast
from mpjax._autocast.hoist import hoist_casts_out_of_scans
from mpjax._jaxpr.passes import apply_passes
from mpjax._tree import float0_to_zeros, is_inexact, is_key, sum_of_squares, to_full
from mpjax._xla_cpu.convolutions import put_channels_last
from mpjax._xla_cpu.hints import prevent_fusion
from mpjax.optimizer import scale_loss
from mpjax.policy import PolicyRules


class Gradients(NamedTuple):
    """Gradients, loss and other results of one pass over a batch.

    Attributes:
      scaled: like params; gradients of the scaled loss, float32 at least, zero for
        integer parameters.
      squares: float32 scalar, the sum of their squares.
      loss: float32 scalar, unscaled.
      model_state: new model state, in the dtypes of the old.
      aux: auxiliary outputs of the loss.
    """

    scaled: Any
    squares: jax.Array
    loss: jax.Array
    model_state: Any
    aux: Any


def scaled_gradients(
    loss_fn, state, batch, key, *, num_microbatches: int, rules: PolicyRules | None
) -> Gradients:
    """Differentiates the scaled loss over one batch, in one or several pieces.

    Args:
      loss_fn: `(params, model_state, batch, key) -> (loss, (model_state, aux))`, casts
        included.
      state: the `TrainState`.
      batch: arrays whose first axis counts examples.
      key: PRNG key of this step.
      num_microbatches: number of pieces. Gradients, loss and floating aux are means
        over them, integer aux sums. The model state passes from piece to piece.
      rules: policies for autocast; None for no autocast.

    Raises:
      ValueError: if the batch cannot be cut into so many equal pieces.
    """

    def loss_and_aux(params, model_state, batch, key):
        loss, (model_state, aux) = loss_fn(params, model_state, batch, key)
        if jnp.shape(loss) != ():
            raise ValueError(
                f"loss_fn must return a scalar loss, got shape {jnp.shape(loss)}; "
                "take its mean, in float32."
            )
        loss = to_full(jnp.asarray(loss))
        return scale_loss(loss, state.opt_state), (loss, model_state, aux)

    # A CPU keeps a float16 gradient in float32 anyway.
    is_unfused = rules is not None and rules.default.compute_dtype != jnp.float16

    def piece_gradients(params, model_state, batch, key) -> Gradients:
        grads, (loss, new_state, aux) = jax.grad(
            loss_and_aux, has_aux=True, allow_int=True
        )(params, model_state, batch, key)
        floats = [g for g in jax.tree.leaves(grads) if is_inexact(g)]
        squares = sum_of_squares(prevent_fusion(floats) if is_unfused else floats)
        grads = jax.tree.map(lambda g: to_full(float0_to_zeros(g)), grads)
        return Gradients(grads, squares, loss, cast_like(new_state, model_state), aux)

    def mean_gradients(params, model_state, pieces, keys) -> Gradients:
        def body(carry, piece):
            total, model_state = carry
            out = piece_gradients(params, model_state, *piece)
            total = jax.tree.map(jnp.add, total, out.scaled)
            return (total, out.model_state), (out.loss, out.aux)

        zeros = jax.tree.map(_zero_gradient, params)
        (total, model_state), (losses, aux) = jax.lax.scan(
            body, (zeros, model_state), (pieces, keys)
        )
        mean = jax.tree.map(lambda g: g / num_microbatches, total)
        reduce = lambda x: x.mean(0) if is_inexact(x) else x.sum(0)
        return Gradients(
            scaled=mean,
            squares=sum_of_squares(mean),
            loss=losses.mean(),
            model_state=model_state,
            aux=jax.tree.map(reduce, aux),
        )

    gradients = piece_gradients
    if num_microbatches > 1:
        # Casts that the loss itself makes run once, not for every piece.
        gradients = apply_passes(
            mean_gradients, hoist_casts_out_of_scans, put_channels_last
        )
        batch = split_batch(batch, num_microbatches)
        key = jax.random.split(key, num_microbatches)
    if rules is not None:
        gradients = autocast(gradients, rules)
    return gradients(state.params, state.model_state, batch, key)


def checkpointed(loss_fn: Callable[..., Any], policy: Any) -> Callable[..., Any]:
    """Wraps a loss so that its backward pass rematerializes what `policy` drops.

    Args:
      loss_fn: any function.
      policy: a name in `jax.checkpoint_policies` that ends in `_saveable`, a function
        of that kind, or None for `loss_fn` itself.

    Raises:
      ValueError: for an unknown name.
    """
    if policy is None:
        return loss_fn
    if isinstance(policy, str):
        known = [n for n in dir(jax.checkpoint_policies) if n.endswith("_saveable")]
        if policy not in known:
            raise ValueError(
                f"checkpoint_policy={policy!r} is none of {', '.join(known)}; pass any "
                "other policy as a function."
            )
        policy = getattr(jax.checkpoint_policies, policy)
    return jax.checkpoint(loss_fn, policy=policy)


def split_batch(batch: Any, num: int) -> Any:
    """Cuts arrays of shape (B, ...) into (num, B / num, ...).

    Piece i takes the examples i, i + num, ...: a batch split over devices stays split.

    Raises:
      ValueError: if `num` does not divide B.
    """

    def split(path, x):
        if x.ndim == 0 or x.shape[0] % num:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has shape {x.shape}, whose first "
                f"axis cannot be cut into num_microbatches={num} equal pieces."
            )
        return x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree_util.tree_map_with_path(split, batch)


def cast_like(tree: Any, like: Any) -> Any:
    """Casts each array to the dtype of its counterpart; keys pass through."""

    def cast(x, target):
        return x if is_key(target) else jnp.asarray(x, target.dtype)

    return jax.tree.map(cast, tree, like)


def _zero_gradient(param: Any) -> jax.Array:
    if is_inexact(param):
        return jnp.zeros_like(to_full(param))
    return jnp.zeros(param.shape, jnp.float32)
