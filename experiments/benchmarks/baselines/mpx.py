"""mpx (`mixed-precision-for-jax`), as its page shows."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.baselines.baseline import (
    Baseline,
    Case,
    Step,
    copy_arrays,
    jax_step,
)


def mixed(case: Case, *, half: str) -> Step:
    """Builds a step of its filtered gradients, which cast and scale, and its update."""
    module: Any = importlib.import_module("mpx")
    workload = case.workload
    module.set_half_precision_datatype(jnp.dtype(half))

    def loss_fn(params, batch):
        return workload.loss_fn(params, batch, jax.random.key(0))[0]

    def step(state, batch):
        params, opt_state, scaling = state
        loss, scaling, finite, grads = module.filter_value_and_grad(loss_fn, scaling)(
            params, batch
        )
        params, opt_state = module.optimizer_update(
            params, workload.tx, opt_state, grads, finite
        )
        return (params, opt_state, scaling), loss

    params = copy_arrays(case.params)
    scaling = module.DynamicLossScaling(jnp.float32(2.0**15), jnp.float32(1.0))
    state = (params, workload.tx.init(params), scaling)
    return jax_step(jax.jit(step, donate_argnums=0), state, case.batch, lambda x: x)


def baselines() -> list[Baseline]:
    """Returns its dynamic loss scaling in float16 and bfloat16."""
    needs = ("mpx", 'pip install "mixed-precision-for-jax"')
    return [
        Baseline(
            f"mpx, {half}, dynamic",
            functools.partial(mixed, half=half),
            f"jmp, {half}",
            needs=needs,
        )
        for half in ("float16", "bfloat16")
    ]
