"""Calls a loss, and says what is right if its arguments or results are not."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mpjax._train.checks import refuse_other_than_arrays
from mpjax._train.describe import describe, is_array
from mpjax.optimizer import recorded_scaled_losses


def call_loss(
    loss_fn: Callable[..., Any], params: Any, model_state: Any, batch: Any, key: Any
) -> tuple[Any, tuple[Any, Any]]:
    """Calls a loss of either form.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `(loss, aux)`; with a model state,
        `(params, model_state, batch, key) -> (loss, (model_state, aux))`.
      params: any pytree of arrays.
      model_state: likewise, or None.
      batch: likewise.
      key: PRNG key of this step.

    Returns:
      `(loss, (model_state, aux))`, with None for what there is not.

    Raises:
      TypeError: if it takes or returns something else.
      ValueError: if the new model state has another structure, or other shapes.
    """
    if model_state is None:
        check_arguments(loss_fn, "loss_fn", ("params", "batch", "key"))
        outputs = _loss_and_aux(loss_fn(params, batch, key))
    else:
        names = ("params", "model_state", "batch", "key")
        check_arguments(loss_fn, "loss_fn", names)
        outputs = loss_fn(params, model_state, batch, key)
        outputs = _loss_state_and_aux(outputs, model_state)
    _, (_, aux) = outputs
    refuse_other_than_arrays(aux=aux)
    return outputs


def refuse_scaled_loss(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, which raises ValueError if it returns `scale_loss(...)`."""

    @functools.wraps(loss_fn)
    def checked(*args: Any) -> Any:
        with recorded_scaled_losses() as scaled:
            outputs = loss_fn(*args)
        loss = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
        if any(loss is each for each in scaled):
            raise ValueError(
                "loss_fn returned a loss from scale_loss, and make_train_step scales "
                "the loss itself: return the true loss."
            )
        return outputs

    return checked


def check_arguments(fn: Callable[..., Any], what: str, names: tuple[str, ...]) -> None:
    """Raises TypeError if a function cannot be called with these arguments.

    Args:
      fn: any function.
      what: what the message calls it.
      names: names of the positional arguments; `model_state` where there is one.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # Some builtins have none.
        return
    try:
        signature.bind(*names)
    except TypeError:
        has_state = "model_state" in names
        raise TypeError(
            f"the state has {'a' if has_state else 'no'} model state, so {what} is "
            f"called as {what}({', '.join(names)}), but it takes {signature}."
        ) from None


def _loss_and_aux(outputs: Any) -> tuple[Any, tuple[None, Any]]:
    """Returns what a loss without model state returned as `(loss, (None, aux))`.

    Raises:
      TypeError: if it is neither a loss nor `(loss, aux)`.
    """
    if is_array(outputs):
        return outputs, (None, None)
    if isinstance(outputs, (tuple, list)) and len(outputs) == 2:
        loss, aux = outputs
        if is_array(loss):
            return loss, (None, aux)
    raise TypeError(
        "loss_fn(params, batch, key) must return the loss, a scalar, or (loss, aux), "
        f"got {describe(outputs)}. More than one value goes into aux, a dictionary."
    )


def _loss_state_and_aux(outputs: Any, old: Any) -> tuple[Any, tuple[Any, Any]]:
    """Returns what a loss with model state returned, `(loss, (model_state, aux))`.

    Args:
      outputs: what it returned.
      old: the model state that it was given.

    Raises:
      TypeError: if it is of another form.
      ValueError: if the new model state has another structure, or other shapes.
    """
    is_pair = lambda x: isinstance(x, (tuple, list)) and len(x) == 2
    if not (is_pair(outputs) and is_array(outputs[0]) and is_pair(outputs[1])):
        raise TypeError(
            "the state has a model state, so loss_fn(params, model_state, batch, key) "
            "must return (loss, (model_state, aux)), with aux None for none, got "
            f"{describe(outputs)}."
        )
    loss, (new, aux) = outputs
    shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    if jax.tree.structure(new) != jax.tree.structure(old) or shapes(new) != shapes(old):
        raise ValueError(
            "the model state that loss_fn returned must have the structure and shapes "
            f"of the one it was given, {_shapes_of(old)}, got {_shapes_of(new)}."
        )
    return loss, (new, aux)


class DerivativeCheck:
    """Finds out, while a gradient is traced, whether the loss has any.

    A model captured by closure (an NNX module, `state.params` for `params`) is constant
    for JAX: the gradient would be zero, and the run train nothing without a word.
    """

    def __init__(self):
        """Starts with no derivative seen."""
        self._has_derivative = False

    def observe(self, loss: jax.Array) -> jax.Array:
        """Returns the loss; notes whether it is differentiated."""

        @jax.custom_jvp
        def same(loss):
            return loss

        def rule(primals, tangents):
            (loss,), (tangent,) = primals, tangents
            if not isinstance(tangent, SymbolicZero):
                self._has_derivative = True
            return loss, tangent

        same.defjvp(rule, symbolic_zeros=True)
        return same(loss)

    def require_derivative(self) -> None:
        """Raises ValueError if no loss that was observed has a derivative."""
        if not self._has_derivative:
            raise ValueError(
                "the loss does not depend on the trained parameters, so nothing would "
                "be trained: loss_fn must compute with the params that it is given, "
                "not with arrays or a module from outside (merge an NNX module inside, "
                "nnx.merge(graphdef, params)), and without stop_gradient or rounding "
                "on the way to the loss."
            )


def _shapes_of(tree: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [
        f"{jax.tree_util.keystr(path) or 'an array'} {describe(x)}"
        for path, x in leaves[:8]
    ]
    return f"{{{', '.join(named)}{', ...' if len(leaves) > 8 else ''}}}"
