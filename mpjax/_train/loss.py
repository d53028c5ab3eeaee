"""Calls a loss, and says what is right if its arguments or results are not."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


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


def refuse_other_than_arrays(**trees: Any) -> None:
    """Raises TypeError for a tree that holds a module, a function, text or the like.

    Args:
      **trees: trees by the names that the message gives them.
    """
    for name, tree in trees.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_nnx_module)
        for path, leaf in leaves:
            if not _is_array(leaf) or _is_nnx_module(leaf):
                raise TypeError(
                    f"{name}{jax.tree_util.keystr(path)} must be an array, got "
                    f"{describe(leaf)}: {_how_to_split(leaf)}."
                )


def _is_nnx_module(x: Any) -> bool:
    nnx: Any = sys.modules.get("flax.nnx")
    return hasattr(nnx, "Module") and isinstance(x, nnx.Module)


def _how_to_split(leaf: Any) -> str:
    """Returns how the parameters of a framework's model are told from the rest."""
    if isinstance(leaf, str):
        return "text cannot be traced; keep it outside"
    if _is_nnx_module(leaf):
        return (
            "graphdef, params, rest = nnx.split(model, nnx.Param, ...) gives params "
            "and a model_state; inside loss_fn, model = nnx.merge(graphdef, params, "
            "rest, copy=True)"
        )
    module = type(leaf).__module__
    if module.startswith("flax.linen") or hasattr(leaf, "init"):
        return "model.init(key, x)['params'] gives the parameters of a module"
    return (
        "give the arrays alone and put the rest together inside loss_fn, for Equinox "
        "params, static = eqx.partition(model, eqx.is_inexact_array) and eqx.combine("
        "params, static)"
    )


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
    if callable(x) and hasattr(x, "__name__"):
        return f"the function {x.__name__}"
    return f"an object of type {type(x).__name__}"


def _is_array(x: Any) -> bool:
    is_number = isinstance(x, (bool, int, float, complex))
    return is_number or hasattr(x, "dtype") or hasattr(x, "__jax_array__")


def _shapes_of(tree: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [
        f"{jax.tree_util.keystr(path) or 'an array'} {describe(x)}"
        for path, x in leaves[:8]
    ]
    return f"{{{', '.join(named)}{', ...' if len(leaves) > 8 else ''}}}"
