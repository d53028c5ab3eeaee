"""optax by hand: in float32, and cast by jmp with its loss scale, as its page shows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jmp
import optax

import mpjax
from experiments.benchmarks.baselines.baseline import (
    FLOAT32,
    Case,
    Row,
    Step,
    copied,
    jax_step,
)


def float32(case: Case, *, precision: str | None = None) -> Step:
    """The step that a person would write: no checks, donated state."""
    work = case.work

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(_loss(work))(params, batch)
        updates, opt_state = work.tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    params = copied(case.params)
    state = (params, work.tx.init(params))
    with jax.default_matmul_precision(precision):
        return jax_step(jax.jit(step, donate_argnums=0), state, case.batch, _itself)


def by_jmp(case: Case, *, policy: str, is_scaled: bool) -> Step:
    """Parameters and batch cast by a policy; jmp's dynamic loss scale, or none."""
    work, rules = case.work, mpjax.get_policy(policy)

    def step(state, batch):
        params, opt_state, numbers = state
        # Its pytree cannot be lowered ahead of time, so only its arrays cross over.
        scale: Any = jmp.DynamicLossScale(*numbers) if numbers else jmp.NoOpLossScale()

        def scaled_loss(params, batch):
            half = rules.cast_to_compute((params, batch))
            loss = _loss(work)(*half).astype(jnp.float32)
            return scale.scale(loss), loss

        grads, loss = jax.grad(scaled_loss, has_aux=True)(params, batch)
        grads = scale.unscale(rules.cast_to_param(grads))
        updates, new_opt_state = work.tx.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        if numbers:
            finite = jmp.all_finite(grads)
            scale = scale.adjust(finite)
            numbers = (scale.loss_scale, scale.counter)
            new_params, new_opt_state = jmp.select_tree(
                finite, (new_params, new_opt_state), (params, opt_state)
            )
        return (new_params, new_opt_state, numbers), loss

    params = copied(case.params)
    numbers = (jnp.float32(2.0**15), jnp.int32(0)) if is_scaled else ()
    state = (params, work.tx.init(params), numbers)
    return jax_step(jax.jit(step, donate_argnums=0), state, case.batch, _itself)


def _loss(work: Any) -> Any:
    return lambda params, batch: work.loss_fn(params, batch, jax.random.key(0))[0]


def _itself(out: Any) -> Any:
    return out


def rows() -> list[Row]:
    """Float32 at the default and the highest precision; jmp in both halves."""
    highest = functools.partial(float32, precision="highest")
    found = [
        Row(FLOAT32, float32, FLOAT32),
        Row("by hand, float32 highest", highest, FLOAT32),
    ]
    for half in ("float16", "bfloat16"):
        policy = f"mixed_{half}"
        plain = f"jmp, {half}"
        for name, is_scaled in ((plain, False), (f"{plain}, dynamic", True)):
            build = functools.partial(by_jmp, policy=policy, is_scaled=is_scaled)
            found.append(Row(name, build, plain if is_scaled else FLOAT32))
    return found
