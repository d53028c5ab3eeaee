"""The update of the whole training state, or of none of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._struct import replace_leaves
from mpjax._train.gradients import Gradients
from mpjax._tree import is_inexact, to_full
from mpjax._xla_cpu.hints import order_after
from mpjax.optimizer import LossScaled, LossScaleState, loss_scale_state, select


def apply_gradients(
    state: Any, out: Gradients, tx: Any, ema_decay: float | None, key: Any
) -> tuple[Any, dict[str, Any]]:
    """Takes one step, unless something is not finite.

    Args:
      state: the `TrainState`.
      out: gradients, loss, new model state and aux of the step.
      tx: the optimizer, wrapped by `with_loss_scale`.
      ema_decay: of the averaged parameters, or None.
      key: PRNG key of the new state.

    Returns:
      The new state, and the metrics.

    Raises:
      ValueError: for an aux that uses a metric's name.
    """
    scale = loss_scale_state(state.opt_state).loss_scale
    finite = jnp.isfinite(out.squares)
    sound = _no_new_nonfinite(out.model_state, state.model_state)
    finite = jax.lax.optimization_barrier(finite if sound is None else finite & sound)
    updates, opt_state, finite = _update(tx, out.scaled, state, finite, sound)
    params = jax.tree.map(_apply_update, state.params, updates)
    params = select(finite, params, state.params)
    # Of the same value as `finite`: the rest waits for the parameters.
    keep = functools.partial(select, order_after(finite, params))
    new_state = replace_leaves(
        state,
        step=state.step + jnp.where(finite, 1, 0),
        params=params,
        opt_state=_keep_all_but_scale(keep, opt_state, state.opt_state),
        model_state=keep(out.model_state, state.model_state),
        ema_params=keep(_average(state, params, ema_decay), state.ema_params),
        key=key,
    )
    scaling = loss_scale_state(new_state.opt_state)
    metrics = {
        "loss": out.loss,
        "grad_norm": scale.unscale(jnp.sqrt(out.squares)),
        "grads_finite": finite,
        "loss_scale": jnp.asarray(scale.loss_scale, jnp.float32),
        "num_skipped": scaling.num_skipped,
        "num_consecutive_skipped": scaling.num_consecutive_skipped,
    }
    return new_state, _with_aux(metrics, out.aux)


def _update(tx, scaled: Any, state: Any, finite: Any, sound: Any) -> Any:
    """Calls the optimizer; what wraps the loss scale is told to skip by a NaN.

    Returns:
      Updates, the new state, and whether the step is taken: with an `axis_name` the
      loss scale has asked every device.
    """
    old, params = state.opt_state, state.params
    new: Any
    if isinstance(tx, LossScaled):
        updates, new = tx.update(scaled, old, params, grads_finite=finite)
        return updates, new, new.grads_finite
    if sound is not None:
        scaled = jax.tree.map(lambda g: jnp.where(sound, g, jnp.nan), scaled)
    return *tx.update(scaled, old, params), finite


def _keep_all_but_scale(keep, new: Any, old: Any) -> Any:
    """Keeps the state of an optimizer, but for the loss scale, which has moved.

    What it wraps is kept already; once more makes it wait for the parameters.
    """

    def is_scale(node):
        return isinstance(node, LossScaleState)

    def choose(new, old):
        if not is_scale(new):
            return keep(new, old)
        return new._replace(inner_state=keep(new.inner_state, old.inner_state))

    return jax.tree.map(choose, new, old, is_leaf=is_scale)


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


def _no_new_nonfinite(new: Any, old: Any) -> jax.Array | None:
    """Whether no Inf or NaN is new in a model state; None if it has no floats."""
    sound = [
        jnp.all(jnp.isfinite(n) | ~jnp.isfinite(o))
        for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
        if is_inexact(o)
    ]
    return jnp.stack(sound).all() if sound else None


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
