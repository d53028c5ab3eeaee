"""Updates the whole training state, or nothing of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpjax._struct import replace_leaves
from mpjax._train.means import Gradients
from mpjax._train.trainable import merge_params, split_params
from mpjax._tree import is_inexact, select, to_full
from mpjax._xla_cpu.hints import write_after
from mpjax.optimizer import (
    StepDecision,
    accepted_extra_args,
    is_loss_scale_state,
    loss_scale_state,
)


def apply_gradients(
    state: Any,
    out: Gradients,
    tx: Any,
    ema_decay: float | None,
    key: Any,
    value_fn: Callable[..., jax.Array],
) -> tuple[Any, dict[str, Any]]:
    """Takes one step, unless something is not finite.

    Whether the step is taken is decided here, once, and every array of the training
    state is selected here, once. The optimizer gets the decision as an extra argument.

    Args:
      state: the `TrainState`.
      out: gradients, loss, new model state and aux of the step.
      tx: the optimizer, wrapped by `with_loss_scale`.
      ema_decay: decay of the averaged parameters, or None.
      key: PRNG key of the new state.
      value_fn: the loss as a function of the trained parameters.

    Returns:
      The new state, and the metrics.

    Raises:
      ValueError: for an aux that uses a metric's name, or a wrapper that does not
        pass the decision on.
    """
    scale = loss_scale_state(state.opt_state).loss_scale
    old_params, frozen = split_params(state.params, state.trainable)
    finite = jnp.isfinite(out.squares)
    if _has_floats(state.model_state):
        finite &= model_state_is_finite(out.model_state, state.model_state)
    if out.weight is not None:
        finite &= jnp.isfinite(out.weight)
    extra_args = {
        "value": out.loss,
        "grad": scale.unscale(out.scaled),
        "value_fn": jax.tree_util.Partial(value_fn),
    }
    updates, opt_state, finite = _update(
        tx, out.scaled, state, old_params, finite, extra_args
    )
    is_taken = finite if out.weight is None else finite & (out.weight != 0)
    params = jax.tree.map(_apply_update, old_params, updates)
    params = select(is_taken, params, old_params)

    def select_if_taken(new, old):
        return write_after(params, select(is_taken, new, old), old)

    opt_state = _select_all_but_scale(select_if_taken, opt_state, state.opt_state)
    if out.weight is not None:
        opt_state = _keep_scale(out.weight == 0, opt_state, state.opt_state)
    all_params = merge_params(params, frozen)
    average = _average(state, all_params, ema_decay)
    new_state = replace_leaves(
        state,
        step=state.step + jnp.where(is_taken, 1, 0),
        params=all_params,
        opt_state=opt_state,
        model_state=select_if_taken(out.model_state, state.model_state),
        ema_params=select_if_taken(average, state.ema_params),
        key=key,
    )
    scaling = loss_scale_state(opt_state)
    metrics = {
        "loss": out.loss,
        "grad_norm": scale.unscale(jnp.sqrt(out.squares)),
        "grads_finite": finite,
        "loss_scale": jnp.asarray(scale.loss_scale, jnp.float32),
        "num_skipped": scaling.num_skipped,
        "num_consecutive_skipped": scaling.num_consecutive_skipped,
    }
    if out.weight is not None:
        metrics["loss_weight"] = out.weight
    return new_state, _with_aux(metrics, out.aux)


def model_state_is_finite(new: Any, old: Any) -> jax.Array:
    """Whether no float of a model state that was finite is now Inf or NaN."""
    finite = [
        jnp.all(jnp.isfinite(n) | ~jnp.isfinite(o))
        for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
        if is_inexact(o)
    ]
    return jnp.stack(finite).all()


def _update(
    tx: Any,
    scaled: Any,
    state: Any,
    params: Any,
    finite: jax.Array,
    extra_args: dict[str, Any],
) -> tuple[Any, Any, jax.Array]:
    """Returns updates and optimizer state as of a step taken, and whether it is taken.

    `with_loss_scale` may still skip it: for another device of its `axis_name`, or for
    gradients that something around it changed.

    Raises:
      ValueError: if the decision does not reach `with_loss_scale` and the model state
        has floats, which `with_loss_scale` does not see.
    """
    decision = StepDecision(finite, scaled)
    extra_args = accepted_extra_args(tx, extra_args | {"grads_finite": decision})
    update = optax.with_extra_args_support(tx).update
    updates, opt_state = update(scaled, state.opt_state, params, **extra_args)
    if not decision.has_arrived and _has_floats(state.model_state):
        raise ValueError(
            f"{_wrapper_name(state.opt_state)} does not pass the extra argument "
            "grads_finite on to with_loss_scale, so the loss scale would not back off "
            "for a model state that is not finite; put with_loss_scale outside: "
            "with_loss_scale(wrapper(tx))."
        )
    old, new = loss_scale_state(state.opt_state), loss_scale_state(opt_state)
    return updates, opt_state, finite & (new.num_skipped == old.num_skipped)


def _has_floats(tree: Any) -> bool:
    return any(map(is_inexact, jax.tree.leaves(tree)))


def _wrapper_name(opt_state: Any) -> str:
    """Returns what the wrappers around `with_loss_scale` call their states."""
    if is_loss_scale_state(opt_state):
        return "a wrapper"
    children = jax.tree.leaves(opt_state, is_leaf=lambda x: x is not opt_state)
    inner = next(x for x in children if _holds_loss_scale(x))
    own = type(opt_state).__name__
    if own in ("tuple", "list", "dict"):
        return _wrapper_name(inner)
    return f"the optimizer whose state is {own}"


def _holds_loss_scale(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree, is_leaf=is_loss_scale_state)
    return any(map(is_loss_scale_state, leaves))


def _select_all_but_scale(
    select_if_finite: Callable[[Any, Any], Any], new: Any, old: Any
) -> Any:
    """Selects an optimizer's state, except the loss scale and its counters."""

    def choose(new, old):
        if not is_loss_scale_state(new):
            return select_if_finite(new, old)
        inner_state = select_if_finite(new.inner_state, old.inner_state)
        return new._replace(inner_state=inner_state)

    return jax.tree.map(choose, new, old, is_leaf=is_loss_scale_state)


def _keep_scale(is_kept: jax.Array, new: Any, old: Any) -> Any:
    """Keeps the loss scale of a step without examples, which counts as skipped."""

    def choose(new, old):
        if not is_loss_scale_state(new):
            return new
        kept = old._replace(
            num_skipped=old.num_skipped + 1, inner_state=new.inner_state
        )
        return select(is_kept, kept, new)

    return jax.tree.map(choose, new, old, is_leaf=is_loss_scale_state)


def _apply_update(param: jax.Array, update: jax.Array) -> jax.Array:
    if not is_inexact(param):
        return param
    return (param + update).astype(param.dtype)


def _average(state: Any, params: Any, decay: float | None) -> Any:
    if state.ema_params is None or decay is None:
        return None
    return jax.tree.map(
        lambda e, p: e + (1 - decay) * (to_full(p) - e) if is_inexact(e) else p,
        state.ema_params,
        params,
    )


def _with_aux(metrics: dict[str, Any], aux: Any) -> dict[str, Any]:
    if aux is None:
        return metrics
    aux = dict(aux) if isinstance(aux, dict) else {"aux": aux}
    clash = sorted(metrics.keys() & aux.keys())
    if clash:
        raise ValueError(
            f"aux uses the names of the step's own metrics: {', '.join(clash)}; "
            "rename them."
        )
    return metrics | aux
