"""Loss scaling as an optax transform.

`with_loss_scale(tx)` takes scaled gradients and does the rest of NVIDIA's recipe:
unscale in float32, check, skip or update, adjust the scale. An existing loop adopts it
in two lines: wrap the optimizer, and scale the loss with `scale_loss`.
"""

import contextlib
import contextvars
import inspect
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from mpjax._tree import (
    float0_to_zeros,
    is_half,
    is_inexact,
    select,
    sum_of_squares,
    to_full,
)
from mpjax.half_weights import MasterWeightsState, StochasticRoundingState
from mpjax.loss_scale import (
    DynamicLossScale,
    NoOpLossScale,
    StaticLossScale,
    as_loss_scale,
)

_scaled_losses: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "scaled_losses", default=None
)


class LossScaleState(NamedTuple):
    """State of `with_loss_scale`.

    Attributes:
      loss_scale: the loss scale for the next step.
      grads_finite: boolean scalar; whether the last step was taken: its gradients had
        a finite norm, or the caller said so.
      num_skipped: int32 scalar; steps skipped so far, those without examples too.
      num_consecutive_skipped: int32 scalar; steps skipped since the last finite one.
      inner_state: the state of the wrapped optimizer.
    """

    loss_scale: Any
    grads_finite: jax.Array
    num_skipped: jax.Array
    num_consecutive_skipped: jax.Array
    inner_state: Any


@jax.tree_util.register_pytree_node_class
class StepDecision:
    """A train step's decision whether it is taken, on its way to `with_loss_scale`.

    `make_train_step` passes it as the extra argument `grads_finite`, which optax's own
    wrappers pass on. Then `with_loss_scale` does not check the same gradients again,
    and selects nothing: the updates and the inner state that it returns are those of
    a step taken, and the train step keeps its old arrays if the step is skipped. Only
    the loss scale and the counters follow the decision.

    Attributes:
      finite: boolean scalar; False skips the step.
    """

    def __init__(self, finite: jax.Array, gradients: Any):
        """Notes the decision, and the gradients that it is about.

        Args:
          finite: boolean scalar.
          gradients: pytree of the gradients that were checked.
        """
        self.finite = finite
        self._checked = jax.tree.leaves(gradients)
        self._arrivals: list[bool] = []

    def arrive(self) -> None:
        """Notes that `with_loss_scale` got the decision."""
        self._arrivals.append(True)

    @property
    def has_arrived(self) -> bool:
        """Whether `with_loss_scale` got it, and no wrapper around dropped it."""
        return bool(self._arrivals)

    def refuse_changed(self, updates: Any) -> None:
        """Raises ValueError if `updates` are not the gradients that were checked.

        Within a `jit` or `cond` of a wrapper's own they cannot be compared.
        """
        traces = {id(getattr(x, "_trace", None)) for x in self._checked}
        is_comparable = all(
            id(getattr(x, "_trace", None)) in traces for x in jax.tree.leaves(updates)
        )
        if is_comparable and not self.covers(updates):
            raise ValueError(
                "something before or around with_loss_scale changes the gradients, "
                "which are still scaled there, so that clipping, noise or decay act on "
                "the wrong magnitudes; put it inside: with_loss_scale(optax.chain("
                "optax.clip_by_global_norm(1.0), tx))."
            )

    def covers(self, updates: Any) -> bool:
        """Whether all of these gradients are among those that were checked."""
        checked = set(map(id, self._checked))
        return all(id(x) in checked for x in jax.tree.leaves(updates))

    def tree_flatten(self) -> tuple[tuple[jax.Array], "StepDecision"]:
        """Returns the decision as a leaf, so that it passes through `jit`."""
        return (self.finite,), self

    @classmethod
    def tree_unflatten(cls, aux: "StepDecision", children: Any) -> "StepDecision":
        """Returns the decision with another leaf."""
        decision = object.__new__(cls)
        decision.__dict__.update(aux.__dict__, finite=children[0])
        return decision


def with_loss_scale(
    tx: Any,
    loss_scale: Any = DynamicLossScale(),
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it takes gradients of a scaled loss.

    On each update the gradients are checked, and unscaled in float32. If they are
    finite, `tx` updates as usual; clipping, weight decay and schedules inside `tx` work
    on true magnitudes. If they are not, the updates are zero and the state of `tx`
    stays bitwise unchanged. Then the loss scale is adjusted.

    The check is one pass: gradients count as finite if the sum of their squares is, in
    float32, before unscaling. So a step is skipped not only for an Inf or NaN, but also
    where the norm of the scaled gradients exceeds 1.8e19, beyond which clipping and
    second moments would be infinite.

    Half-precision parameters reach `tx` as float32, so that moments, norms and epsilons
    are float32 too; `optax.apply_updates` rounds to half. The exception is a `tx` with
    `with_master_weights` or `with_stochastic_rounding` inside: these take the
    half-precision parameters themselves.

    What changes gradients belongs inside: clipping, noise, `optax.MultiSteps` and
    `optax.apply_if_finite`. Before or around `with_loss_scale` they see scaled
    gradients; `MultiSteps` would multiply a NaN by zero and stay NaN, `apply_if_finite`
    hide overflows from the loss scale. `make_train_step`, `scale_loss` and
    `loss_scale_state` refuse what they can see of this.

    Args:
      tx: an optax transform, or an `optax.MultiSteps`.
      loss_scale: one of `mpjax.loss_scale`, or any object with jmp's protocol. If it
        also has `.observe(scaled_grads, axis_name=...) -> Self`, `observe` is given the
        gradients of every step, skipped or not, before `.adjust`.
      axis_name: mesh axes of the surrounding `shard_map`; a step counts as finite only
        if it is finite on every device along them.

    Returns:
      An optax transform whose state is a `LossScaleState`. Its `update` also takes
      `grads_finite=`, a boolean scalar that replaces its own check: False skips the
      step. With `axis_name` it is still combined over all devices. (`make_train_step`
      passes a `StepDecision`, and selects the results itself.) Other extra arguments
      reach `tx`, where it takes them: `value=` and `value_fn=` are those of the true
      loss, not of the scaled one; `grad` becomes the unscaled gradients.

    Raises:
      TypeError: if `tx` is not an optimizer, or `loss_scale` not a loss scale.
    """
    refuse_other_than_optimizer(tx)
    tx = optax.with_extra_args_support(tx)
    initial = as_loss_scale(loss_scale)

    def init(params):
        inner_state = _init_inner(tx, params)
        if _find(inner_state, LossScaleState):
            raise ValueError(
                "with_loss_scale around an optimizer that has a loss scale already: "
                "the gradients would be unscaled twice; drop one of the two."
            )
        return LossScaleState(
            loss_scale=jax.tree.map(lambda x: jnp.array(x, copy=True), initial),
            grads_finite=jnp.array(True),
            num_skipped=jnp.zeros((), jnp.int32),
            num_consecutive_skipped=jnp.zeros((), jnp.int32),
            inner_state=inner_state,
        )

    def update(updates, state, params=None, *, grads_finite=None, **extra_args):
        scaled = jax.tree.map(to_full, updates)
        is_decided = isinstance(grads_finite, StepDecision)
        finite = _is_finite(updates, scaled, grads_finite)
        finite = _on_every_device(finite, axis_name)
        full = params if takes_half(state.inner_state) else _to_full_tree(params)
        grads = jax.tree.map(float0_to_zeros, state.loss_scale.unscale(scaled))
        extra_args = accepted_extra_args(tx, extra_args | {"grad": grads})
        updates, inner_state = tx.update(grads, state.inner_state, full, **extra_args)
        if not is_decided:
            updates = jax.tree.map(
                lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates
            )
            inner_state = select(finite, inner_state, state.inner_state)
        updates = _zeros_for_integers(updates, params)
        observed = _observe(state.loss_scale, scaled, axis_name)
        return updates, state._replace(
            loss_scale=observed.adjust(finite),
            grads_finite=finite,
            num_skipped=state.num_skipped + jnp.where(finite, 0, 1),
            num_consecutive_skipped=jnp.where(
                finite, 0, state.num_consecutive_skipped + 1
            ),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def refuse_other_than_optimizer(tx: Any) -> None:
    """Raises TypeError if `tx` is no optax transform, such as `optax.adam` uncalled."""
    if hasattr(tx, "init") and hasattr(tx, "update"):
        return
    hint = ""
    if hasattr(tx, "adjust"):
        hint = "; the optimizer comes first: with_loss_scale(tx, loss_scale)"
    elif callable(tx):
        name = getattr(tx, "__name__", "tx")
        hint = f"; if it makes an optimizer, call it, as in {name}(1e-3)"
    raise TypeError(
        f"expected an optax optimizer, with init and update, got {tx!r}{hint}."
    )


def accepted_extra_args(tx: Any, extra_args: dict[str, Any]) -> dict[str, Any]:
    """Returns those extra arguments that the `update` of an optimizer takes."""
    parameters = inspect.signature(tx.update).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return extra_args
    return {name: x for name, x in extra_args.items() if name in parameters}


def scale_loss(loss: jax.Array, opt_state: Any) -> jax.Array:
    """Multiplies a loss by the current scale, in float32 at least.

    Differentiate the result; log the loss itself, which `has_aux=True` returns beside
    the gradients: `return scale_loss(loss, opt_state), loss`. Warns if something comes
    before `with_loss_scale` in an `optax.chain`, and if a scale that adjusts itself is
    a constant of what is traced.

    Args:
      loss: scalar of any floating dtype.
      opt_state: a state that holds the state of `with_loss_scale` at any depth.

    Returns:
      The scaled loss; take its gradient and give that to `tx.update`.

    Raises:
      TypeError: if the arguments are exchanged.
      ValueError: if it holds no state of `with_loss_scale`, or more than one, or one
        inside `optax.MultiSteps` or `optax.apply_if_finite`.
    """
    if _find(loss, LossScaleState):
        raise TypeError("the loss comes first: scale_loss(loss, opt_state).")
    _warn_of_what_comes_before(opt_state)
    loss_scale = loss_scale_state(opt_state).loss_scale
    _warn_of_a_constant(loss_scale)
    scaled = loss_scale.scale(loss)
    recorded = _scaled_losses.get()
    if recorded is not None:
        recorded.append(scaled)
    return scaled


@contextlib.contextmanager
def recorded_scaled_losses() -> Iterator[list[Any]]:
    """Collects what `scale_loss` returns inside, so that no loss is scaled twice."""
    scaled: list[Any] = []
    token = _scaled_losses.set(scaled)
    try:
        yield scaled
    finally:
        _scaled_losses.reset(token)


def _warn_of_a_constant(loss_scale: Any) -> None:
    """Warns if a function is being traced that would keep today's scale for ever."""
    if isinstance(loss_scale, NoOpLossScale | StaticLossScale):
        return
    if _scaled_losses.get() is not None:  # in a train step, which refuses the loss
        return
    scale = loss_scale.loss_scale
    # Under a trace even what is computed from constants is traced.
    is_traced = isinstance(jnp.add(scale, 0), Tracer)
    if is_traced and not isinstance(scale, Tracer):
        warnings.warn(
            "the loss scale is a constant of the function that is traced: jax.jit and "
            "mpjax.autocast keep it from the first call on. Pass opt_state to that "
            "function as an argument.",
            stacklevel=3,
        )


def _warn_of_what_comes_before(opt_state: Any) -> None:
    """Warns if `with_loss_scale` is not the first of an `optax.chain`.

    A chain's state is a tuple of its parts' states; what the others do does not show.
    """
    leaves = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_loss_scale_state)
    for path, leaf in leaves:
        indices = [key.idx for key in path if hasattr(key, "idx")]
        if is_loss_scale_state(leaf) and any(indices):
            warnings.warn(
                "something comes before with_loss_scale in an optax.chain, and would "
                "see gradients that are still scaled, so that clipping, noise or decay "
                "act on the wrong magnitudes; put it inside: with_loss_scale("
                "optax.chain(optax.clip_by_global_norm(1.0), tx)).",
                stacklevel=3,
            )


def loss_scale_state(opt_state: Any) -> LossScaleState:
    """Returns the state of `with_loss_scale` inside an optimizer's state.

    Args:
      opt_state: any pytree: states of chain, masked, multi_transform,
        inject_hyperparams, MultiSteps and the like, nested as they come.

    Raises:
      ValueError: if there is none, or more than one, or if `optax.MultiSteps` or
        `optax.apply_if_finite` stands around it.
    """
    for wrapper, name in _REFUSED.items():
        if any(_find(x, LossScaleState) for x in _find(opt_state, wrapper)):
            raise ValueError(
                f"optax.{name} around with_loss_scale hides overflows from the loss "
                f"scale, or keeps them for good; put it inside: "
                f"with_loss_scale(optax.{name}(tx, ...))."
            )
    found = _find(opt_state, LossScaleState)
    if not found:
        raise ValueError(
            "no loss scale in this optimizer state; wrap the optimizer before init: "
            "tx = mpjax.with_loss_scale(tx), with mpjax.NoOpLossScale() for none."
        )
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} loss scales in this optimizer state, but one loss has one "
            "scale: wrap the whole optimizer, with_loss_scale(multi_transform(...))."
        )
    return found[0]


_REFUSED = {
    optax.MultiStepsState: "MultiSteps",
    optax.ApplyIfFiniteState: "apply_if_finite",
}


def is_loss_scale_state(node: Any) -> bool:
    """Whether a node of an optimizer's state is a state of `with_loss_scale`."""
    return isinstance(node, LossScaleState)


def _is_finite(updates: Any, scaled: Any, grads_finite: Any) -> jax.Array:
    """Returns whether a step counts as finite, by its own check or its caller's."""
    if not isinstance(grads_finite, StepDecision):
        if grads_finite is None:
            return jnp.isfinite(sum_of_squares(scaled))
        return jnp.asarray(grads_finite)
    grads_finite.arrive()
    grads_finite.refuse_changed(updates)
    if grads_finite.covers(updates):
        return grads_finite.finite
    # A jit or cond of a wrapper's own hides whether something changed the gradients.
    return grads_finite.finite & jnp.isfinite(sum_of_squares(scaled))


def _on_every_device(finite: jax.Array, axis_name: Any) -> jax.Array:
    """Whether `finite` holds on every device; a barrier keeps it from being fused."""
    finite = jax.lax.optimization_barrier(finite)
    if axis_name is None:
        return finite
    return jax.lax.pmin(finite.astype(jnp.int32), axis_name).astype(bool)


def _observe(loss_scale: Any, scaled: Any, axis_name: Any) -> Any:
    observe = getattr(loss_scale, "observe", None)
    return loss_scale if observe is None else observe(scaled, axis_name=axis_name)


def _init_inner(tx: optax.GradientTransformation, params: Any) -> Any:
    inner_state = tx.init(params)
    if takes_half(inner_state) or not any(map(is_half, jax.tree.leaves(params))):
        return inner_state
    return tx.init(_to_full_tree(params))


def takes_half(inner_state: Any) -> bool:
    """Whether an optimizer keeps half parameters without losing small updates."""
    return bool(_find(inner_state, (MasterWeightsState, StochasticRoundingState)))


def _to_full_tree(params: Any) -> Any:
    return jax.tree.map(to_full, params)


def _zeros_for_integers(updates: Any, params: Any) -> Any:
    """Zeroes updates of integer parameters; weight decay would move them by 1."""
    if params is None:
        return updates
    return jax.tree.map(
        lambda u, p: u if is_inexact(p) else jnp.zeros_like(u), updates, params
    )


def _find(tree: Any, kind: Any) -> list[Any]:
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [node for node in nodes if isinstance(node, kind)]
