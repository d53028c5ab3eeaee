"""flax's DynamicScale, as its examples use it."""

import jax
import jax.numpy as jnp
import optax
from flax.training import dynamic_scale

import mpjax
from experiments.benchmarks.baselines.baseline import Case, Row, Step, copied, jax_step


def dynamic(case: Case) -> Step:
    """Float16 by casts; gradients finite or not, and a selection of the old state."""
    work, policy = case.work, mpjax.get_policy("mixed_float16")

    def step(state, batch):
        params, opt_state, scale = state

        def loss_fn(params):
            loss, _ = work.loss_fn(
                *policy.cast_to_compute((params, batch)), jax.random.key(0)
            )
            return loss.astype(jnp.float32)

        scale, finite, loss, grads = scale.value_and_grad(loss_fn)(params)
        updates, new_opt_state = work.tx.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = (keep(new_params, params), keep(new_opt_state, opt_state), scale)
        return new_state, loss

    params = copied(case.params)
    scale = dynamic_scale.DynamicScale()
    numbers = {"scale": jnp.float32(2.0**15), "fin_steps": jnp.int32(0)}
    scale = scale.replace(**numbers)
    state = (params, work.tx.init(params), scale)
    return jax_step(jax.jit(step, donate_argnums=0), state, case.batch, lambda x: x)


def rows() -> list[Row]:
    """One row, beside jmp's casts without loss scaling."""
    return [Row("flax DynamicScale, float16", dynamic, "jmp, float16")]
