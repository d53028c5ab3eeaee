"""Train steps of the workloads, the shapes of their states, and what they cost."""

from typing import Any

import jax

import mpjax
from experiments.benchmarks._attention import attention_in
from experiments.benchmarks.workloads import Workload
from mpjax import cost


def make_step(
    workload: Workload, policy: str, *, loss_scale: Any = None, **kwargs: Any
):
    """Returns a train step of a model, and its state's shapes and dtypes.

    Args:
      workload: the model.
      policy: precision policy of the step, and of the parameters it is given.
      loss_scale: dynamic if None.
      kwargs: other arguments of `make_train_step`.
    """
    tx = mpjax.with_loss_scale(workload.tx, loss_scale or mpjax.DynamicLossScale())

    def init(key):
        params = mpjax.get_policy(policy).cast_to_param(workload.init_params(key))
        make_state = workload.init_model_state
        model_state = None if make_state is None else make_state(key)
        return mpjax.TrainState.create(params=params, tx=tx, model_state=model_state)

    step = mpjax.make_train_step(workload.loss_fn, tx, policy=policy, **kwargs)
    return step, jax.eval_shape(init, jax.random.key(0))


def measure_cost(
    workload: Workload, step: Any, state: Any, batch_size: int, device: str | None
) -> dict[str, Any]:
    """Compiles a train step, and returns what all rows of memory have.

    Args:
      workload: the model.
      step: its train step.
      state: the step's state, or shapes and dtypes.
      batch_size: examples per step.
      device: as `mpjax.cost.analyze` takes it; None for the one of this machine.

    Returns:
      Columns of the tables, and the step's `attention`: "xla", "cudnn" or None.
    """
    make_batch = lambda key: workload.make_batch(key, batch_size)
    batch = jax.eval_shape(make_batch, jax.random.key(0))
    report = cost.analyze(step, state, batch, device=device)
    roofline_s = report.roofline_s
    jaxpr = lambda: str(jax.make_jaxpr(step)(state, batch))
    return {
        "temporaries_mb": report.temporary_bytes / 1e6,
        "peak_mb": report.peak_bytes / 1e6,
        "moved_mb": report.moved_bytes / 1e6,
        "roofline_ms": None if roofline_s is None else 1e3 * roofline_s,
        "bound": report.bound,
        "attention": attention_in(workload, jaxpr),
    }
