"""mpjax: by autocast and by casts, with and without what it can do beside."""

import functools
from typing import Any

import mpjax
from experiments.benchmarks.baselines.baseline import (
    FLOAT32,
    Case,
    Row,
    Step,
    copied,
    jax_step,
)

# Of transformers a CPU takes two examples.
NUM_MICROBATCHES = {
    2: ("transformer_block", "transformer"),
    4: ("mlp", "convnet", "bigru"),
}


def train_step(case: Case, **kwargs: Any) -> Step:
    """`make_train_step` with its arguments; no loss scaling unless one is given."""
    return jax_step(*parts(case, **kwargs))


def parts(
    case: Case,
    *,
    policy: str,
    loss_scale: Any = None,
    master_weights: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Returns the step, its state and batch, and what of its output is the loss."""
    tx = mpjax.with_master_weights(case.work.tx) if master_weights else case.work.tx
    tx = mpjax.with_loss_scale(tx, loss_scale or mpjax.NoOpLossScale())
    params = mpjax.get_policy(policy).cast_to_param(copied(case.params))
    ema = "ema_decay" in kwargs
    state = mpjax.TrainState.create(params=params, tx=tx, ema=ema)
    step = mpjax.make_train_step(case.work.loss_fn, tx, policy=policy, **kwargs)
    return step, state, case.batch, lambda metrics: metrics["loss"]


def rows() -> list[Row]:
    """Float32, and in both halves by autocast, plain, dynamic and with each option."""
    part = functools.partial
    found = [Row("mpjax, float32", part(train_step, policy="float32"), FLOAT32)]
    dynamic = mpjax.DynamicLossScale()
    for half in ("float16", "bfloat16"):
        plain = f"mpjax, {half}"
        build = part(train_step, policy=f"mixed_{half}")
        found += [
            Row(plain, build, FLOAT32),
            Row(f"{plain}, dynamic", part(build, loss_scale=dynamic), plain),
            Row(f"{plain}, casts", part(build, autocast=False), plain),
        ]
    scaled = part(train_step, policy="mixed_float16", loss_scale=dynamic)
    beside = "mpjax, float16, dynamic"
    half_params = part(scaled, policy="float16", master_weights=True)
    found += [
        Row(f"{beside}, master weights", half_params, beside),
        Row(f"{beside}, EMA", part(scaled, ema_decay=0.999), beside),
    ]
    for num, works in NUM_MICROBATCHES.items():
        build = part(scaled, num_microbatches=num)
        found.append(Row(f"{beside}, {num} microbatches", build, beside, works))
    return found
