"""A functional train step that leaves the training state as it was on an overflow."""

import functools
import numbers
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mpjax._autocast import autocast as autocast_function
from mpjax._struct import pytree_dataclass, replace_fields
from mpjax._train.checks import (
    check_ema,
    check_layout,
    check_optimizer,
    check_options,
    check_params,
    check_state,
    refuse_empty,
    refuse_other_than_arrays,
    warn_of_collections,
    warn_of_half_params,
    warn_of_unused,
    warn_of_unused_layout,
)
from mpjax._train.explain import JittedStep
from mpjax._train.gradients import (
    checkpointed,
    differentiable_loss,
    scaled_gradients,
)
from mpjax._train.loss import (
    call_loss,
    check_arguments,
    refuse_scaled_loss,
)
from mpjax._train.trainable import find_trainable, split_params
from mpjax._train.update import apply_gradients
from mpjax._tree import is_half, is_inexact, is_key, path_name, to_full
from mpjax._xla_cpu.switch import partitioned
from mpjax.optimizer import loss_scale_state, refuse_other_than_optimizer
from mpjax.policy import (
    PolicyLike,
    PolicyRules,
    cast_to_compute,
    casts_by_hand,
    resolve,
)
from mpjax.sharding import (
    LayoutRules,
    batch_sharding,
    check_batch,
    check_placement,
    state_sharding,
)

LABELS = r"(?i)label|target|(^|/)y$"
REDUCE_DTYPES = ("float32", "compute")


@pytree_dataclass(static=("trainable",))
class TrainState:
    """Everything that a training step reads and writes.

    Attributes:
      step: int32 scalar, optimizer steps taken; a skipped step does not count.
      params: the parameters, any pytree of arrays.
      opt_state: state of an optimizer wrapped by `with_loss_scale`.
      model_state: state of the model, such as BatchNorm statistics, or None.
      ema_params: float32 exponential moving average of the parameters, or None.
      key: typed PRNG key; moves on every step, skipped or not.
      trainable: for each leaf of `params`, whether it is trained; None if all are. Part
        of the structure, not a leaf.
    """

    step: Any
    params: Any
    opt_state: Any
    model_state: Any
    ema_params: Any
    key: Any
    trainable: tuple[bool, ...] | None = None

    @classmethod
    def create(
        cls,
        *,
        params: Any,
        tx: optax.GradientTransformation,
        model_state: Any = None,
        ema: bool = False,
        key: jax.Array | None = None,
        trainable: str | Callable[[str], bool] | None = None,
    ) -> Self:
        """Builds the state for step 0.

        Every leaf is a fresh, strongly typed array of its own, so that the step can be
        given the state's memory (donation) while the caller keeps `params`.

        Args:
          params: the parameters.
          tx: an optimizer wrapped by `with_loss_scale`.
          model_state: as `loss_fn` takes it, or None.
          ema: whether to average the parameters; needs `ema_decay` in the step.
          key: typed PRNG key; `jax.random.key(0)` if None.
          trainable: which parameters are trained, for fine-tuning: a regular expression
            that is searched in their paths (`head/kernel`, `.*/lora_a`), or a predicate
            on a path. The others are frozen: not differentiated, without optimizer
            state, and an overflow in what would be their gradient skips no step. `tx`
            sees `optax.MaskedNode()` in their place. None trains all.

        Raises:
          ValueError: if `tx` is not wrapped by `with_loss_scale`, or `trainable`
            selects no parameter.
          TypeError: if `key` is a legacy uint32 key, `tx` not an optimizer, or `params`
            or `model_state` hold something else than arrays.
        """
        key = jax.random.key(0) if key is None else key
        if not is_key(key):
            raise TypeError(
                f"expected a typed key, such as jax.random.key(0), got {key!r}; "
                "convert a legacy key with jax.random.wrap_key_data."
            )
        refuse_other_than_optimizer(tx)
        refuse_other_than_arrays(params=params, model_state=model_state)
        warn_of_collections(params)
        is_trained = find_trainable(params, trainable)
        trained, _ = split_params(params, is_trained)
        opt_state = tx.init(trained)
        loss_scale_state(opt_state)
        state = cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=opt_state,
            model_state=model_state,
            ema_params=jax.tree.map(to_full, params) if ema else None,
            key=key,
            trainable=is_trained,
        )
        return jax.tree.map(_fresh, state)

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields replaced, inside jit or outside.

        The values go in as they are: nothing is copied, cast or checked, and the
        optimizer state still belongs to the old parameters.

        >>> import mpjax, optax
        >>> tx = mpjax.with_loss_scale(optax.sgd(0.1))
        >>> state = TrainState.create(params={"w": jnp.zeros(2)}, tx=tx)
        >>> state = state.replace(params={"w": jnp.ones(2)})
        >>> state.params["w"].tolist(), int(state.step)
        ([1.0, 1.0], 0)

        Args:
          **changes: new values by the names of fields, such as `params`.

        Raises:
          TypeError: for a name that is not a field; the message lists the fields.
        """
        return replace_fields(self, changes)


def make_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    policy: PolicyLike | PolicyRules = "mixed_float16",
    autocast: bool = True,
    num_microbatches: int = 1,
    loss_weight: Callable[[Any], Any] | None = None,
    ema_decay: float | None = None,
    mesh: Mesh | None = None,
    layout: LayoutRules | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    reduce_dtype: str = "float32",
    checkpoint_policy: str | Callable[..., bool] | None = None,
    donate: bool = True,
    no_cast_inputs: str = LABELS,
) -> JittedStep:
    """Builds a jitted train step with loss scaling.

    A step whose gradients or new model state are not finite is skipped: params,
    optimizer, model state, EMA and step stay bitwise unchanged; only the loss
    scale, the skip counters and the key change.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `(loss, aux)`; where the state has a
        model state, `(params, model_state, batch, key) -> (loss, (model_state, aux))`.
        The loss is a scalar, the mean over the batch.
      tx: the optimizer, wrapped by `with_loss_scale`.
      policy: the dtype to compute in. Rules are matched against the name scope of an
        op (autocast) or the path of a parameter or input (casts).
      autocast: True calls `loss_fn` on the arrays as they are, and runs its matmuls and
        convolutions in half and its sensitive ops in float32, forward and backward; see
        `mpjax.autocast`. False casts parameters (`params/...`) and floating inputs
        (`batch/...`) to the compute dtype, as jmp users do, and leaves the rest to
        `loss_fn`; integers and the model state are never cast. A policy whose
        parameters are not float32 (`float16`, `float64`) always casts.
      num_microbatches: number of pieces that the batch is cut into. Their gradients are
        averaged in float32; the memory of activations shrinks accordingly.
      loss_weight: `batch -> scalar`, what the loss of a batch is a mean over: a number
        of examples, or of tokens that are not padding (`batch["mask"].sum()`). Then
        gradients, loss and floating aux are means weighted by it, over microbatches and
        over the devices of `axis_name` (of `mesh`, `loss_fn` sees the whole batch). A
        piece of weight 0 is left out, its Inf, NaN, integer aux and model state too; a
        total of 0 skips the step and leaves the loss scale. None weighs all pieces
        alike, which is wrong for a mean over what is not padding.
      ema_decay: decay of the averaged parameters, in [0, 1]; the state needs
        `ema=True`.
      mesh: devices to split the batch over; see `mpjax.sharding`. The state is placed
        with `shard_state` first.
      layout: rules by which the mesh splits parameters, the same as `shard_state` got;
        None for the built-in layout.
      axis_name: for a step inside `shard_map`: the axes over which gradients, loss,
        model state and floating aux are averaged, integer aux added up.
      reduce_dtype: the dtype in which the devices of `mesh` or `axis_name` add up their
        parts of a gradient. "float32": what goes nowhere but to a gradient is float32
        from the sum over the batch on, with autocast or without it; the operands of
        a matmul stay half, and so does what fsdp gathers. The part of a convolution is
        rounded once, on its device. "compute": the dtype that computes it, half for
        matmuls, which halves what the devices send. Without several devices nothing
        changes.
      checkpoint_policy: which residuals the forward pass saves; the backward pass
        rematerializes the others. A name in `jax.checkpoint_policies` such as
        "dots_saveable" (matmuls alone), or a function of that kind. None saves all.
        Layers under a `jax.checkpoint` of their own save more memory.
      donate: whether the step may reuse the memory of its input state, which is then no
        longer readable.
      no_cast_inputs: regular expression, used where inputs are cast; floating inputs
        whose path contains a match stay as they are. By default labels and targets, and
        what is named `y`; an empty string matches none.

    Returns:
      `train_step(state, batch) -> (state, metrics)`, a jitted function (so it has
      `.lower`). The metrics are scalars on the device: `loss` and `grad_norm`
      (unscaled, float32), `grads_finite`, `loss_scale` (the scale of this step),
      `num_skipped`, `num_consecutive_skipped`, `loss_weight` where there is one, and
      the entries of `aux` (under `aux` where it is not a dictionary).

    Raises:
      TypeError: if `loss_fn` or `loss_weight` is no function, `tx` no optimizer, `mesh`
        no mesh or `layout` no rules; at the first call, if `loss_fn` returns none of
        these forms, or the state is no `TrainState`.
      ValueError: for a number out of range, an unknown policy or `reduce_dtype`,
        float64 without x64, or a layout without a mesh; at the first call, for a batch
        without examples, or that cannot be cut or split over the mesh, a rule of
        `layout` that does not fit its parameter, a loss or weight that is not a scalar,
        a loss that depends on no trained parameter, a new model state of other keys or
        shapes, an aux that uses a metric's name, a state of another optimizer, with an
        EMA but no decay, or the reverse; for a state that is placed otherwise than
        `mesh` and `layout` say; and for one that was given to a step before, with
        `donate`.
    """
    rules = resolve(policy)
    if not callable(loss_fn):
        raise TypeError(
            f"make_train_step(loss_fn, tx) takes a function first, got {loss_fn!r}."
        )
    refuse_other_than_optimizer(tx)
    if not isinstance(num_microbatches, numbers.Integral) or num_microbatches < 1:
        raise ValueError(
            f"num_microbatches={num_microbatches!r} must be a whole number, at least 1."
        )
    if ema_decay is not None and not 0 <= ema_decay <= 1:
        raise ValueError(f"ema_decay={ema_decay} must be between 0 and 1.")
    check_options(mesh, no_cast_inputs)
    check_layout(mesh, layout)
    if reduce_dtype not in REDUCE_DTYPES:
        raise ValueError(
            f"reduce_dtype={reduce_dtype!r} must be 'float32', or 'compute' for the "
            "dtype that the policy computes in."
        )
    if loss_weight is not None and not callable(loss_weight):
        raise TypeError(
            "loss_weight must be a function of a batch, such as lambda batch: "
            f"batch['mask'].sum(), got {loss_weight!r}."
        )

    is_shared = axis_name is not None or (mesh is not None and mesh.size > 1)
    is_widened = is_shared and reduce_dtype == "float32"
    casts = casts_by_hand(rules, autocast)
    loss_fn = checkpointed(refuse_scaled_loss(loss_fn), checkpoint_policy)

    def cast_loss_fn(params, model_state, batch, key):
        if casts:
            params = cast_to_compute(rules, params, root="params")
            batch = cast_to_compute(rules, batch, root="batch", no_cast=no_cast_inputs)
        return call_loss(loss_fn, params, model_state, batch, key)

    def train_step(state: TrainState, batch: Any):
        check_state(state, TrainState)
        check_optimizer(state, tx)
        check_ema(state, ema_decay)
        refuse_empty(batch)
        if casts:
            check_params(state.params, rules)
        key, step_key = jax.random.split(state.key)
        if mesh is not None:
            batch = _over_devices(batch, mesh)
            state = _laid_out(state, mesh, layout)
            warn_of_unused_layout(layout)
        params, frozen = split_params(state.params, state.trainable)
        warn_of_half_params(params, rules, state.opt_state)
        model_state = state.model_state
        if axis_name is not None:
            step_key = jax.random.fold_in(step_key, jax.lax.axis_index(axis_name))
            frozen, model_state = _varying((frozen, model_state), axis_name)

        @partitioned(mesh is not None)
        def gradients(params):
            if axis_name is not None:
                params = _varying(params, axis_name)
            return scaled_gradients(
                cast_loss_fn,
                (_widen(params, rules, casts), frozen),
                model_state,
                state.opt_state,
                batch,
                step_key,
                num_microbatches=num_microbatches,
                rules=None if casts else rules,
                loss_weight=loss_weight,
                axis_name=axis_name,
                mesh=mesh,
                is_widened=is_widened,
            )

        out = gradients(params)
        warn_of_unused(rules, casts)
        scale = loss_scale_state(state.opt_state).loss_scale
        value_fn = differentiable_loss(gradients, scale)
        new_state, metrics = apply_gradients(state, out, tx, ema_decay, key, value_fn)
        if mesh is not None:
            new_state = _laid_out(new_state, mesh, layout)
        return new_state, metrics

    check = None
    if mesh is not None:
        check = functools.partial(_check_placed, mesh=mesh, layout=layout)
    return JittedStep(
        train_step, donate=donate, mesh=mesh, layout=layout, check_placement=check
    )


def make_eval_step(
    eval_fn: Callable[..., Any],
    *,
    policy: PolicyLike | PolicyRules = "mixed_float16",
    autocast: bool = True,
    mesh: Mesh | None = None,
    use_ema: bool = False,
    no_cast_inputs: str = LABELS,
) -> JittedStep:
    """Builds a jitted evaluation step.

    Args:
      eval_fn: `(params, batch) -> outputs`, or `(params, model_state, batch) ->
        outputs` where the state has a model state.
      policy: the dtype to compute in; floating outputs are cast to its output dtype
        (with rules, the default policy's).
      autocast: as in `make_train_step`.
      mesh: devices to split the batch over.
      use_ema: whether to evaluate the averaged parameters.
      no_cast_inputs: as in `make_train_step`.

    Returns:
      `eval_step(state, batch) -> outputs`, jitted; the state stays readable.

    Raises:
      ValueError: for an unknown policy; at the first call, if `use_ema` and the state
        has no averaged parameters.
    """
    rules = resolve(policy)
    if not callable(eval_fn):
        raise TypeError(f"make_eval_step takes a function first, got {eval_fn!r}.")
    check_options(mesh, no_cast_inputs)
    casts = casts_by_hand(rules, autocast)

    def eval_step(state: TrainState, batch: Any):
        check_state(state, TrainState)
        if use_ema and state.ema_params is None:
            raise ValueError("use_ema=True needs TrainState.create(..., ema=True).")
        params = state.ema_params if use_ema else state.params
        if mesh is not None:
            batch = _over_devices(batch, mesh)
        if casts:
            params = cast_to_compute(rules, params, root="params")
            batch = cast_to_compute(rules, batch, root="batch", no_cast=no_cast_inputs)
        names, args = ("params", "batch"), (params, batch)
        if state.model_state is not None:
            names, args = (
                ("params", "model_state", "batch"),
                (params, state.model_state, batch),
            )
        check_arguments(eval_fn, "eval_fn", names)
        evaluate = eval_fn if casts else autocast_function(eval_fn, rules)
        return rules.default.cast_to_output(evaluate(*args))

    return JittedStep(eval_step, donate=False, mesh=mesh)


def _check_placed(state: Any, *, mesh: Mesh, layout: LayoutRules | None) -> None:
    check_state(state, TrainState)
    check_placement(state, mesh, layout=layout)


def _laid_out(state: Any, mesh: Mesh, layout: LayoutRules | None) -> Any:
    shardings = state_sharding(state, mesh, layout=layout)
    return jax.lax.with_sharding_constraint(state, shardings)


def _over_devices(batch: Any, mesh: Mesh) -> Any:
    check_batch(batch, mesh)
    return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))


def _widen(params: Any, rules: PolicyRules, casts: bool) -> Any:
    """Casts half parameters to the policy's compute dtype where that is wider.

    So the loss is differentiated with respect to the wide copies; otherwise gradients
    would be rounded to half on their way back through the cast.
    """

    def widen(path, x):
        policy = rules.default
        if casts:
            policy = rules.policy_for(f"params/{path_name(path)}")
        is_wider = is_half(x) and not is_half(policy.compute_dtype)
        return x.astype(policy.compute_dtype) if is_wider else x

    return jax.tree_util.tree_map_with_path(widen, params)


def _varying(tree: Any, axis_name: Any) -> Any:
    """Marks floats as varying over devices.

    Otherwise shard_map would sum the gradients before their check and mean.
    """

    def vary(x):
        return jax.lax.pcast(x, axis_name, to="varying") if is_inexact(x) else x

    return jax.tree.map(vary, tree)


def _fresh(x: Any) -> jax.Array:
    """Returns a copy with memory of its own and without weak type."""
    x = jnp.asarray(x)
    if is_key(x):
        return jax.random.clone(x)
    return jnp.array(x, dtype=x.dtype, copy=True)
