"""Scaled gradients of a loss, cast by policy, over microbatches and devices."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._autocast import autocast
from mpjax._autocast.hoist import hoist_casts_out_of_scans
from mpjax._jaxpr.passes import apply_passes
from mpjax._train.loss import DerivativeCheck
from mpjax._train.means import Gradients, mean_over_devices, weigh, weigh_pieces
from mpjax._train.reductions import widen_gradients
from mpjax._train.trainable import merge_params
from mpjax._tree import (
    float0_to_zeros,
    is_floating,
    is_inexact,
    is_key,
    sum_of_squares,
    to_full,
)
from mpjax._xla_cpu.convolutions import put_channels_last
from mpjax._xla_cpu.hints import prevent_fusion
from mpjax.optimizer import loss_scale_state
from mpjax.policy import PolicyRules


def scaled_gradients(
    loss_fn: Callable[..., Any],
    params: tuple[Any, Any],
    model_state: Any,
    opt_state: Any,
    batch: Any,
    key: Any,
    *,
    num_microbatches: int,
    rules: PolicyRules | None,
    loss_weight: Callable[[Any], Any] | None,
    axis_name: Any,
    mesh: Any,
    is_widened: bool,
) -> Gradients:
    """Differentiates the scaled loss over one batch, in one or several pieces.

    Args:
      loss_fn: `(params, model_state, batch, key) -> (loss, (model_state, aux))`, casts
        included.
      params: the trained parameters and the frozen ones, as from `split_params`.
      model_state: as `loss_fn` takes it.
      opt_state: holds the loss scale.
      batch: arrays whose first axis counts examples.
      key: PRNG key of this step.
      num_microbatches: number of pieces. The model state passes from piece to piece.
      rules: policies for autocast; None for no autocast.
      loss_weight: `batch -> scalar`, what the loss of a piece counts; None if all count
        alike.
      axis_name: axes of the surrounding `shard_map`, or None.
      mesh: the devices that XLA splits the batch over, or None.
      is_widened: whether gradients are float32 before devices add them up.

    Returns:
      Gradients, loss and floating aux are means over pieces and devices, integer aux
      sums.

    Raises:
      TypeError: if the loss is not a real floating number.
      ValueError: if the batch cannot be cut into so many equal pieces, loss or weight
        is not a scalar, or the loss does not depend on the trained parameters.
    """
    check = DerivativeCheck()
    scale = loss_scale_state(opt_state).loss_scale

    def loss_and_aux(trained, frozen, model_state, batch, key):
        params = merge_params(trained, frozen)
        loss, (model_state, aux) = loss_fn(params, model_state, batch, key)
        if jnp.shape(loss) != ():
            raise ValueError(
                f"loss_fn must return a scalar loss, got shape {jnp.shape(loss)}; "
                "take its mean, in float32."
            )
        loss = jnp.asarray(loss)
        if not is_floating(loss):
            raise TypeError(
                f"loss_fn must return a real, floating loss, got {loss.dtype}; an "
                "accuracy or a count has no gradient and belongs into aux."
            )
        loss = check.observe(to_full(loss))
        return scale.scale(loss), (loss, model_state, aux)

    # A CPU keeps a float16 gradient in float32 anyway; a widened one is float32.
    is_unfused = (
        rules is not None
        and not is_widened
        and rules.default.compute_dtype != jnp.float16
    )

    def piece_gradients(trained, frozen, model_state, batch, key) -> Gradients:
        grads, (loss, new_state, aux) = jax.grad(
            loss_and_aux, has_aux=True, allow_int=True
        )(trained, frozen, model_state, batch, key)
        floats = jax.tree.map(lambda g: g if is_inexact(g) else None, grads)
        squares = sum_of_squares(prevent_fusion(floats) if is_unfused else floats)
        grads = jax.tree.map(lambda g: to_full(float0_to_zeros(g)), grads)
        return Gradients(grads, squares, loss, cast_like(new_state, model_state), aux)

    def mean_gradients(trained, frozen, model_state, pieces, keys, shares) -> Gradients:
        def body(carry, piece):
            total, model_state = carry
            batch, key, share = piece
            out = piece_gradients(trained, frozen, model_state, batch, key)
            if share is not None:
                out = weigh(out, share, model_state)
            total = jax.tree.map(jnp.add, total, out.scaled)
            return (total, out.model_state), (out.loss, out.aux)

        zeros = jax.tree.map(_zero_gradient, trained)
        (total, model_state), (losses, aux) = jax.lax.scan(
            body, (zeros, model_state), (pieces, keys, shares)
        )
        # Weighted results are added up, since the shares add up to 1.
        is_weighed = shares is not None
        combine = lambda x: x.sum(0) if is_weighed or not is_inexact(x) else x.mean(0)
        if not is_weighed:
            total = jax.tree.map(lambda g: g / num_microbatches, total)
        return Gradients(
            scaled=total,
            squares=sum_of_squares(total),
            loss=combine(losses),
            model_state=model_state,
            aux=jax.tree.map(combine, aux),
        )

    is_cut = num_microbatches > 1
    if is_cut:
        batch = split_batch(batch, num_microbatches)
        key = jax.random.split(key, num_microbatches)
    weights = None
    if loss_weight is not None:
        weights = weigh_pieces(loss_weight, batch, num_microbatches, axis_name)
    gradients, args = piece_gradients, (*params, model_state, batch, key)
    if is_cut:
        # Casts that the loss itself makes run once, not for every piece.
        gradients = apply_passes(
            mean_gradients, hoist_casts_out_of_scans, put_channels_last
        )
        args = (*args, weights and weights.of_pieces)
    if rules is not None:
        gradients = autocast(gradients, rules)
    if is_widened:
        num_gradients = len(jax.tree.leaves(params[0]))
        widen = functools.partial(
            widen_gradients, num_gradients=num_gradients, mesh=mesh
        )
        gradients = apply_passes(gradients, widen)
    out = gradients(*args)
    check.require_derivative()
    if is_cut or axis_name is not None:
        _warn_of_examples_in_aux(out.aux, batch, is_cut)
    if weights is not None and not is_cut:
        weighed = weigh(out, weights.of_device, model_state)
        # On a single device the share is 1, or the whole step is skipped.
        is_alone = axis_name is None
        out = weighed._replace(scaled=out.scaled) if is_alone else weighed
    if axis_name is not None:
        out = mean_over_devices(out, axis_name, weights)
    return out._replace(weight=weights and weights.total)


def differentiable_loss(
    gradients: Callable[[Any], Gradients], loss_scale: Any
) -> Callable[..., jax.Array]:
    """Returns the loss as a function of the parameters, for line searches.

    Its gradient is that of the scaled loss, unscaled, so that it does not underflow in
    half precision.

    Args:
      gradients: from the trained parameters to their gradients.
      loss_scale: the scale of this step.
    """

    @jax.custom_vjp
    def loss(params):
        return gradients(params).loss

    def forward(params):
        out = gradients(params)
        return out.loss, (loss_scale.unscale(out.scaled), params)

    def backward(saved, cotangent):
        def times(grad, param):
            if is_inexact(param):
                return (grad * cotangent).astype(param.dtype)
            return np.zeros(param.shape, jax.dtypes.float0)

        return (jax.tree.map(times, *saved),)

    loss.defvjp(forward, backward)

    # A line search hands on every extra argument of an update that it has no use for.
    def value_fn(params, *, grads_finite=None):
        del grads_finite
        return loss(params)

    return value_fn


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


def _warn_of_examples_in_aux(aux: Any, batch: Any, is_cut: bool) -> None:
    """Warns of aux per example, which would be averaged over unrelated examples."""
    sizes = {x.shape[is_cut] for x in jax.tree.leaves(batch) if jnp.ndim(x) > is_cut}
    for path, x in jax.tree_util.tree_leaves_with_path(aux):
        if jnp.ndim(x) and jnp.shape(x)[0] > 1 and {jnp.shape(x)[0]} == sizes:
            where = f"aux{jax.tree_util.keystr(path)}"
            warnings.warn(
                f"{where} has shape {jnp.shape(x)}, and a microbatch or device has "
                f"{jnp.shape(x)[0]} examples: aux is averaged over microbatches and "
                "devices element by element, so unrelated examples would be mixed. "
                "Return a mean or a sum, or compute outputs with make_eval_step.",
                stacklevel=2,
            )


def _zero_gradient(param: Any) -> jax.Array:
    if is_inexact(param):
        return jnp.zeros_like(to_full(param))
    return jnp.zeros(param.shape, jnp.float32)
