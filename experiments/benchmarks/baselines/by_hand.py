"""optax by hand: in float32, and in half by jmp's casts and loss scale."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jmp
import optax

import mpjax
from experiments.benchmarks.baselines.baseline import (
    FLOAT32,
    Baseline,
    Case,
    Step,
    copy_arrays,
    jax_step,
)


def float32(case: Case, *, precision: str | None = None) -> Step:
    """Builds the step that a person would write: no checks, donated state."""
    workload = case.workload

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(_loss(workload))(params, batch)
        updates, opt_state = workload.tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    params = copy_arrays(case.params)
    state = (params, workload.tx.init(params))
    with jax.default_matmul_precision(precision):
        return jax_step(jax.jit(step, donate_argnums=0), state, case.batch, lambda x: x)


def by_jmp(case: Case, *, policy: str, scaled: bool) -> Step:
    """Builds the step that jmp's page shows, with its dynamic loss scale or none."""
    workload, rules = case.workload, mpjax.get_policy(policy)

    def step(state, batch):
        params, opt_state, numbers = state
        # jmp's pytree cannot be lowered ahead of time: the state holds its arrays.
        scale: Any = jmp.DynamicLossScale(*numbers) if numbers else jmp.NoOpLossScale()

        def scaled_loss(params, batch):
            half = rules.cast_to_compute((params, batch))
            loss = _loss(workload)(*half).astype(jnp.float32)
            return scale.scale(loss), loss

        grads, loss = jax.grad(scaled_loss, has_aux=True)(params, batch)
        grads = scale.unscale(rules.cast_to_param(grads))
        updates, new_opt_state = workload.tx.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        if numbers:
            finite = jmp.all_finite(grads)
            scale = scale.adjust(finite)
            numbers = (scale.loss_scale, scale.counter)
            new_params, new_opt_state = jmp.select_tree(
                finite, (new_params, new_opt_state), (params, opt_state)
            )
        return (new_params, new_opt_state, numbers), loss

    params = copy_arrays(case.params)
    numbers = (jnp.float32(2.0**15), jnp.int32(0)) if scaled else ()
    state = (params, workload.tx.init(params), numbers)
    return jax_step(jax.jit(step, donate_argnums=0), state, case.batch, lambda x: x)


def baselines() -> list[Baseline]:
    """Returns float32 at the default and the highest precision, and jmp in half."""
    highest = functools.partial(float32, precision="highest")
    found = [
        Baseline(FLOAT32, float32, FLOAT32),
        Baseline("by hand, float32 highest", highest, FLOAT32),
    ]
    for half in ("float16", "bfloat16"):
        policy = f"mixed_{half}"
        plain = f"jmp, {half}"
        for name, scaled in ((plain, False), (f"{plain}, dynamic", True)):
            build = functools.partial(by_jmp, policy=policy, scaled=scaled)
            found.append(Baseline(name, build, plain if scaled else FLOAT32))
    return found


def _loss(workload: Any) -> Any:
    return lambda params, batch: workload.loss_fn(params, batch, jax.random.key(0))[0]
