"""Flax's `DynamicScale`, as its examples use it."""

import jax
import jax.numpy as jnp
import optax
from flax.training import dynamic_scale

import mpjax
from experiments.benchmarks.baselines.baseline import (
    Baseline,
    Case,
    Step,
    copy_arrays,
    jax_step,
)


def dynamic(case: Case) -> Step:
    """Builds a step that casts to float16, and keeps the old state if not finite."""
    workload, policy = case.workload, mpjax.get_policy("mixed_float16")

    def step(state, batch):
        params, opt_state, scale = state

        def loss_fn(params):
            loss, _ = workload.loss_fn(
                *policy.cast_to_compute((params, batch)), jax.random.key(0)
            )
            return loss.astype(jnp.float32)

        scale, finite, loss, grads = scale.value_and_grad(loss_fn)(params)
        updates, new_opt_state = workload.tx.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)

        def select(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = (
            select(new_params, params),
            select(new_opt_state, opt_state),
            scale,
        )
        return new_state, loss

    params = copy_arrays(case.params)
    scale = dynamic_scale.DynamicScale()
    numbers = {"scale": jnp.float32(2.0**15), "fin_steps": jnp.int32(0)}
    scale = scale.replace(**numbers)
    state = (params, workload.tx.init(params), scale)
    return jax_step(jax.jit(step, donate_argnums=0), state, case.batch, lambda x: x)


def baselines() -> list[Baseline]:
    """Returns one baseline, compared with jmp's casts without loss scaling."""
    return [Baseline("flax DynamicScale, float16", dynamic, "jmp, float16")]
