"""Calls a loss, and says what is right if its arguments or results are not."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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
        _check_arguments(loss_fn, ("params", "batch", "key"))
        return _loss_and_aux(loss_fn(params, batch, key))
    _check_arguments(loss_fn, ("params", "model_state", "batch", "key"))
    return _loss_state_and_aux(loss_fn(params, model_state, batch, key), model_state)


def _check_arguments(fn: Callable[..., Any], names: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # Some builtins have none.
        return
    try:
        signature.bind(*names)
    except TypeError:
        has_state = "model_state" in names
        raise TypeError(
            f"the state has {'a' if has_state else 'no'} model state, so loss_fn is "
            f"called as loss_fn({', '.join(names)}), but it takes {signature}."
        ) from None


def _loss_and_aux(outputs: Any) -> tuple[Any, tuple[None, Any]]:
    """Returns what a loss without model state returned as `(loss, (None, aux))`.

    Raises:
      TypeError: if it is neither a loss nor `(loss, aux)`.
    """
    if _is_array(outputs):
        return outputs, (None, None)
    if isinstance(outputs, (tuple, list)) and len(outputs) == 2:
        loss, aux = outputs
        if _is_array(loss):
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
    if not (is_pair(outputs) and _is_array(outputs[0]) and is_pair(outputs[1])):
        raise TypeError(
            "the state has a model state, so loss_fn(params, model_state, batch, key) "
            "must return (loss, (model_state, aux)), with aux None for none, got "
            f"{describe(outputs)}."
        )
    loss, (new, aux) = outputs
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if jax.tree.structure(new) != jax.tree.structure(old) or shapes(new) != shapes(old):
        raise ValueError(
            "the model state that loss_fn returned must have the structure and shapes "
            f"of the one it was given, {_shapes_of(old)}, got {_shapes_of(new)}."
        )
    return loss, (new, aux)


def describe(x: Any) -> str:
    """Returns in some words what a value is: a dtype and shape, a tuple of what."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype}{list(x.shape)}"
    if x is None or isinstance(x, (bool, int, float, complex, str)):
        return repr(x)
    if isinstance(x, dict):
        return f"a dictionary with the keys {', '.join(map(repr, x)) or 'none'}"
    if type(x) in (tuple, list):
        inner = ", ".join(map(describe, x[:4])) + (", ..." if len(x) > 4 else "")
        return f"a {type(x).__name__} of {len(x)}: ({inner})"
    return f"an object of type {type(x).__name__}"


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") or isinstance(x, (int, float))


def _shapes_of(tree: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [
        f"{jax.tree_util.keystr(path) or 'an array'} {describe(x)}"
        for path, x in leaves[:8]
    ]
    return f"{{{', '.join(named)}{', ...' if len(leaves) > 8 else ''}}}"
