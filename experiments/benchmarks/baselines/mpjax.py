"""mpjax: by autocast and by casts, alone and with each of its options."""

import functools
from typing import Any

import mpjax
from experiments.benchmarks.baselines.baseline import (
    FLOAT32,
    Baseline,
    Case,
    Step,
    copy_arrays,
    jax_step,
)

# By number: the models trained so. A CPU's batch of transformers has two examples.
NUM_MICROBATCHES = {
    2: ("transformer_block", "transformer"),
    4: ("mlp", "convnet", "bigru", "speech"),
}


def train_step(case: Case, **kwargs: Any) -> Step:
    """Builds a train step; see `step_and_args`."""
    return jax_step(*step_and_args(case, **kwargs))


def step_and_args(
    case: Case,
    *,
    policy: str,
    loss_scale: Any = None,
    master_weights: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Returns the arguments of `jax_step` for a train step.

    Args:
      case: what it starts from.
      policy: precision policy of the step, and of the parameters it is given.
      loss_scale: no loss scaling if None.
      master_weights: whether the optimizer keeps the parameters in float32.
      kwargs: other arguments of `make_train_step`.
    """
    tx = case.workload.tx
    if master_weights:
        tx = mpjax.with_master_weights(tx)
    tx = mpjax.with_loss_scale(tx, loss_scale or mpjax.NoOpLossScale())
    params = mpjax.get_policy(policy).cast_to_param(copy_arrays(case.params))
    ema = "ema_decay" in kwargs
    state = mpjax.TrainState.create(params=params, tx=tx, ema=ema)
    step = mpjax.make_train_step(case.workload.loss_fn, tx, policy=policy, **kwargs)
    return step, state, case.batch, lambda metrics: metrics["loss"]


def baselines() -> list[Baseline]:
    """Returns float32, float8, and both halves by autocast, casts and each option."""
    part = functools.partial
    found = [Baseline("mpjax, float32", part(train_step, policy="float32"), FLOAT32)]
    dynamic = mpjax.DynamicLossScale()
    for half in ("float16", "bfloat16"):
        plain = f"mpjax, {half}"
        build = part(train_step, policy=f"mixed_{half}")
        found += [
            Baseline(plain, build, FLOAT32),
            Baseline(f"{plain}, dynamic", part(build, loss_scale=dynamic), plain),
            Baseline(f"{plain}, casts", part(build, autocast=False), plain),
        ]
    float8 = part(train_step, policy="mixed_float8")
    wide = ("mlp", "transformer_block", "transformer")
    found.append(
        Baseline("mpjax, float8", float8, "mpjax, bfloat16", wide, platform="gpu")
    )
    scaled = part(train_step, policy="mixed_float16", loss_scale=dynamic)
    reference = "mpjax, float16, dynamic"
    half_params = part(scaled, policy="float16", master_weights=True)
    found += [
        Baseline(f"{reference}, master weights", half_params, reference),
        Baseline(f"{reference}, EMA", part(scaled, ema_decay=0.999), reference),
    ]
    for num, workloads in NUM_MICROBATCHES.items():
        build = part(scaled, num_microbatches=num)
        name = f"{reference}, {num} microbatches"
        found.append(Baseline(name, build, reference, workloads))
    return found
