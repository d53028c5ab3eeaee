"""What a train step refuses, or warns of, when it is put together or first called."""

import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax

from mpjax._train.describe import describe, is_array
from mpjax._train.trainable import split_params
from mpjax._tree import is_floating, is_half, path_name
from mpjax.optimizer import takes_half
from mpjax.policy import PolicyRules
from mpjax.sharding import LayoutRules, batch_sharding


def refuse_other_than_arrays(**trees: Any) -> None:
    """Raises TypeError for a tree that holds a module, a function, text or the like.

    Args:
      **trees: trees by the names that the message gives them.
    """
    for name, tree in trees.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_nnx_module)
        for path, leaf in leaves:
            if not is_array(leaf) or _is_nnx_module(leaf):
                raise TypeError(
                    f"{name}{jax.tree_util.keystr(path)} must be an array, got "
                    f"{describe(leaf)}: {_how_to_split(leaf)}."
                )


def refuse_empty(batch: Any) -> None:
    """Raises ValueError for a batch without examples, whose loss would be NaN."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    shapes = {jax.tree_util.keystr(k): x.shape for k, x in leaves if x.shape}
    if shapes and all(shape[0] == 0 for shape in shapes.values()):
        path, shape = next(iter(shapes.items()))
        raise ValueError(f"the batch has no examples: batch{path} has shape {shape}.")


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


def check_options(mesh: Any, no_cast_inputs: Any) -> None:
    """Raises TypeError or ValueError for a mesh or an expression that is none."""
    if mesh is not None:
        if not isinstance(mesh, jax.sharding.Mesh):
            raise TypeError(
                "mesh must be a jax.sharding.Mesh, such as jax.make_mesh((jax."
                f"device_count(),), ('data',)), got {describe(mesh)}."
            )
        batch_sharding(mesh)
    try:
        re.compile(no_cast_inputs)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"no_cast_inputs={no_cast_inputs!r} is not a regular expression: {error}."
        ) from error


def check_layout(mesh: Any, layout: Any) -> None:
    """Raises TypeError or ValueError for a layout that is none, or without a mesh."""
    if layout is None:
        return
    if not isinstance(layout, LayoutRules):
        raise TypeError(
            "layout must be mpjax.sharding.LayoutRules([(pattern, PartitionSpec), "
            f"...]), got {describe(layout)}."
        )
    if mesh is None:
        raise ValueError(
            "layout= says how a mesh splits the parameters, but mesh=None: pass the "
            "mesh too."
        )


def warn_of_unused_layout(layout: LayoutRules | None) -> None:
    """Warns while tracing of layout rules that match no parameter."""
    unused = () if layout is None else layout.unused_rules()
    if unused:
        warnings.warn(
            f"the layout rules {', '.join(map(repr, unused))} match no path of a "
            "parameter, which looks like params/Dense_0/kernel.",
            stacklevel=2,
        )


def check_state(state: Any, kind: type) -> None:
    """Raises TypeError if a step's first argument is no `TrainState`."""
    if not isinstance(state, kind):
        raise TypeError(
            "a step takes first the state, which TrainState.create returned, "
            f"got {describe(state)}."
        )


def warn_of_collections(params: Any) -> None:
    """Warns of Linen variables given whole, with BatchNorm statistics as parameters."""
    if isinstance(params, Mapping) and "params" in params and len(params) > 1:
        others = ", ".join(repr(name) for name in params if name != "params")
        warnings.warn(
            f"params has 'params' and {others}, which looks like all variables of a "
            "Linen model: the optimizer would train statistics as if they were "
            "weights. Pass params=variables.pop('params'), model_state=variables.",
            stacklevel=3,
        )


def check_optimizer(state: Any, tx: Any) -> None:
    """Raises ValueError if the state was created with another optimizer."""
    trained, _ = split_params(state.params, state.trainable)
    expected = jax.eval_shape(tx.init, trained)
    if jax.tree.structure(expected) != jax.tree.structure(state.opt_state):
        raise ValueError(
            "the state was created with another optimizer than the step: pass the same "
            "tx to TrainState.create and make_train_step, and create a new state when "
            "optimizer, loss scale or trained parameters change."
        )


def check_ema(state: Any, ema_decay: float | None) -> None:
    """Raises ValueError for an average without a decay, or the reverse."""
    if (state.ema_params is None) != (ema_decay is None):
        raise ValueError(
            f"ema_decay={ema_decay}, and the state has "
            f"{'no' if state.ema_params is None else 'an'} average: pass both "
            "TrainState.create(..., ema=True) and make_train_step(..., ema_decay=0.999)"
            ", or neither."
        )


def warn_of_unused(rules: PolicyRules, casts: bool) -> None:
    """Warns while tracing of rules that match nothing: most likely misspelled."""
    unused = rules.unused_rules()
    if unused:
        where = "path of a parameter or input" if casts else "name scope of a matmul"
        remedy = "" if casts else "; autocast=False looks at paths of parameters"
        warnings.warn(
            f"the rules {', '.join(map(repr, unused))} match no {where}{remedy}.",
            stacklevel=2,
        )


def warn_of_half_params(params: Any, rules: PolicyRules, opt_state: Any) -> None:
    """Warns while tracing of half parameters whose small updates round away.

    Args:
      params: the trained parameters.
      rules: the policy; one that keeps parameters in half asks for them.
      opt_state: with master weights or stochastic rounding nothing is lost.
    """
    if takes_half(opt_state):
        return
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        policy = rules.policy_for(f"params/{name}")
        if is_half(x) and not is_half(policy.param_dtype):
            warnings.warn(
                f"{name} is {x.dtype}, and the policy {str(policy)!r} keeps parameters "
                "in float32: updates much smaller than the parameter round away. Cast "
                "with mpjax.get_policy(policy).cast_to_param(params), or wrap the "
                "optimizer: with_loss_scale(with_master_weights(tx)).",
                stacklevel=2,
            )
            return


def check_params(params: Any, rules: PolicyRules) -> None:
    """Raises ValueError for float32 parameters and a policy of half ones."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        policy = rules.policy_for(f"params/{name}")
        if is_half(policy.param_dtype) and is_floating(x) and not is_half(x):
            raise ValueError(
                f"the policy {str(policy)!r} keeps parameters in half precision, but "
                f"{name} is {x.dtype}: take 'mixed_float16' or 'mixed_bfloat16', which "
                "keep them in float32 and compute in half, or create the state with "
                "mpjax.get_policy(policy).cast_to_param(params)."
            )
