"""Says in the words of a train step what an error of JAX or Flax means there."""

import functools
import inspect
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mpjax._jaxpr.core import dtype_of, is_float32, is_jaxpr, is_var, open_jaxpr
from mpjax._report import short_source
from mpjax._train.describe import describe
from mpjax._tree import is_half, refuse_deleted


class JittedStep:
    """A jitted `(state, batch) -> ...` whose errors say what to do.

    Everything that a jitted function has, such as `lower`, is there too.

    Attributes:
      mesh: the mesh that the step was made for, or None.
      layout: the rules by which it splits parameters, or None.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        donate: bool,
        mesh: Any,
        layout: Any = None,
        check_placement: Callable[[Any], None] | None = None,
    ):
        """Jits a step.

        Args:
          step: takes a state and a batch.
          donate: whether it may reuse the memory of the state.
          mesh: the mesh that the step was made for, or None.
          layout: the rules by which it splits parameters, or None.
          check_placement: takes a state; raises an error if its arrays are placed
            otherwise than the step keeps them. None if they may be anywhere.
        """
        functools.update_wrapper(self, step)
        self.mesh, self.layout = mesh, layout
        self._step = step
        self._check_placement = check_placement
        self._placed: list[Any] = []
        self._jitted = jax.jit(step, donate_argnums=(0,) if donate else ())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the step."""
        try:
            self._check_new_placement(args, kwargs)
            return self._jitted(*args, **kwargs)
        except Exception as error:
            _refuse_other_arguments(self._step, args, kwargs, error)
            _refuse_donated(args, kwargs, error)
            _refuse_other_leaves(args, kwargs, error)
            _refuse_axis(error)
            _explain_carry(self._step, args, kwargs, error)
            _explain_merge(error)
            raise

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lowers the step for arrays or shapes, as `lower` of a jitted function."""
        self._check_new_placement(args, kwargs)
        return self._jitted.lower(*args, **kwargs)

    def _check_new_placement(self, args: Any, kwargs: Any) -> None:
        """Checks where a state is placed, unless the last one was placed like it."""
        if self._check_placement is None:
            return
        state = args[0] if args else kwargs.get("state")
        # jaxlib 0.10 crashes on deleted arrays of several devices.
        refuse_deleted(state)
        placed = [
            (getattr(x, "shape", None), getattr(x, "sharding", None))
            for x in jax.tree.leaves(state)
        ]
        if placed != self._placed:
            self._check_placement(state)
            self._placed = placed

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the jitted function."""
        if name == "_jitted":  # Not made yet, as while it is copied.
            raise AttributeError(name)
        return getattr(self._jitted, name)


def _refuse_other_arguments(
    step: Callable[..., Any], args: Any, kwargs: Any, error: Exception
) -> None:
    try:
        inspect.signature(step).bind(*args, **kwargs)
    except TypeError:
        raise TypeError(
            "a step takes (state, batch): put several arrays into one batch, a tuple "
            "or a dictionary; the random key is in the state. It got "
            f"{len(args)} arguments{' and ' if kwargs else ''}{', '.join(kwargs)}."
        ) from error


def _refuse_donated(args: Any, kwargs: Any, error: Exception) -> None:
    if "deleted" in str(error):
        refuse_deleted((args, kwargs), error)


def _refuse_other_leaves(args: Any, kwargs: Any, error: Exception) -> None:
    """Raises TypeError for text, functions and the like in a batch."""
    if not isinstance(error, TypeError):
        return
    batch = kwargs.get("batch", args[1] if len(args) > 1 else None)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        is_text = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm"
        is_number = isinstance(leaf, (bool, int, float, complex))
        if is_text or not (hasattr(leaf, "dtype") or is_number):
            raise TypeError(
                f"batch{jax.tree_util.keystr(path)} must be an array of numbers, got "
                f"{describe(leaf)}: keep what is not numeric out of the batch, and "
                "make arrays with numpy or jnp.asarray."
            ) from error


def _refuse_axis(error: Exception) -> None:
    if isinstance(error, NameError) and "unbound axis name" in str(error):
        raise ValueError(
            "a step with axis_name= runs inside jax.shard_map, over a mesh with that "
            "axis, jax.jit(jax.shard_map(train_step, mesh=mesh, in_specs=(P(), "
            "P('data')), out_specs=P())); without shard_map pass mesh= and no "
            f"axis_name. JAX says: {error}"
        ) from error


def _explain_merge(error: Exception) -> None:
    if type(error).__name__ == "TraceContextError":
        error.add_note(
            "Inside loss_fn, merge an NNX module with a copy, nnx.merge(graphdef, "
            "params, ..., copy=True), and use no module from outside."
        )


def _explain_carry(step: Any, args: Any, kwargs: Any, error: Exception) -> None:
    """Adds to JAX's error about a carry or branch what made it float32."""
    if not isinstance(error, TypeError) or "equal" not in str(error):
        return
    if "float32" not in str(error) or "float16" not in str(error):
        return
    widening = next(filter(None, map(_widening, _jaxprs_of(step, args, kwargs))), None)
    where = "" if widening is None else f" in {widening}"
    error.add_note(
        f"A half value of a loop or branch became float32{where}. With autocast=False "
        "parameters and floating inputs are cast to half, and other arrays stay as "
        "they are: cast those too, table.astype(x.dtype), or pass autocast=True, which "
        "leaves all arrays in float32 and chooses the dtype of each operation."
    )


def _jaxprs_of(step: Any, args: Any, kwargs: Any) -> list[Any]:
    """Returns the loop bodies and branches that JAX was tracing when a step failed.

    They are found in the frames of the traceback, the innermost first; none if JAX
    names them otherwise.
    """
    filtering = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    found: list[Any] = []
    try:
        jax.eval_shape(step, *args, **kwargs)
    except Exception as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            jaxprs = filter(is_jaxpr, frame.f_locals.values())
            found = [*map(open_jaxpr, jaxprs), *found]
    finally:
        jax.config.update("jax_traceback_filtering", filtering)
    return found


def _widening(jaxpr: Any) -> str | None:
    """Returns where a half value met a float32 one on the way to an output."""
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    waiting = [v for v in jaxpr.outvars if is_var(v) and is_float32(v.aval)]
    seen = set(waiting)
    while waiting:
        eqn = makers.get(waiting.pop(0))
        if eqn is None:
            continue
        operands = [v for v in eqn.invars if is_var(v) and is_float32(v.aval)]
        widened = [v for v in operands if _is_cast_from_half(makers.get(v))]
        others = [v for v in operands if v not in widened]
        if widened and others:
            met = others[0].aval.str_short(short_dtypes=False)
            return f"{eqn.primitive.name} at {short_source(eqn)}, where it met {met}"
        waiting += [v for v in operands if v not in seen]
        seen.update(operands)
    return None


def _is_cast_from_half(eqn: Any) -> bool:
    return (
        eqn is not None
        and eqn.primitive.name == "convert_element_type"
        and is_half(dtype_of(eqn.invars[0]))
    )
