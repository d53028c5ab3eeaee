"""Gradient errors of real models: half by hand, and by autocast.

The models are the small ones of `real_models`, and two deep ones. By hand every layer
has `dtype` half. The truth is the gradient in float64, computed by every layer in
float64; what a model itself casts to float32 (the softmax of Llama's attention, the
router of the experts, rotary angles) is float32 there too.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mpjax
from experiments.benchmarks import real_models
from experiments.benchmarks.workloads import Workload
from experiments.harness.intervals import interval_text, ratio_interval
from experiments.harness.results import Column
from experiments.models.small import cast, relative_error

NAME = "accuracy_real"
BATCH_SIZE = 4
NOISE = 0.2  # added to biases and scales, with which blocks begin as the identity
_DEEP = {"width": 64, "num_layers": 24}
# In the deep ones, grad(autocast) is left out: they take minutes to compile.
DEEP_MODELS: dict[str, Callable[[], Workload]] = {
    "gpt2_24_layers": functools.partial(real_models.gpt2, "small", **_DEEP),
    "gpt2_24_layers_scan_remat": functools.partial(
        real_models.gpt2, "small", **_DEEP, scan=True, remat=True
    ),
    "resnet_53_convolutions": functools.partial(
        real_models.resnet50, "small", num_blocks=(3, 4, 6, 3), num_channels=8
    ),
}
MODELS: dict[str, Callable[[], Workload]] = {
    **{
        name: functools.partial(make, "small")
        for name, make in real_models.REAL_MODELS.items()
    },
    **DEEP_MODELS,
}
COLUMNS = (
    Column("model", "model"),
    Column("policy", "policy"),
    Column("error, float32", "error_float32", "{:.1e}"),
    Column("by hand", "error_by_hand", "{:.2e}"),
    Column("autocast(grad)", "error_autocast", "{:.2e}"),
    Column("grad(autocast)", "error_inner_autocast", "{:.2e}"),
    Column("autocast(grad) to by hand", "ratio_autocast", interval_text),
    Column("grad(autocast) to by hand", "ratio_inner_autocast", interval_text),
    Column("not finite, by hand", "num_overflows_by_hand"),
    Column("not finite, autocast", "num_overflows_autocast"),
)


def measure(
    name: str, formats: dict[str, tuple[Any, float]], num_seeds: int
) -> list[dict[str, Any]]:
    """Returns the rows of a model, one per policy.

    Args:
      name: key of `MODELS`.
      formats: by policy, the half dtype and the scale of the loss.
      num_seeds: how many seeds for parameters and batch.
    """
    workload = MODELS[name]()
    assert workload.by_hand is not None
    make = jax.jit(functools.partial(make_arguments, workload))
    args = [jax.device_get(make(jax.random.key(seed))) for seed in range(num_seeds)]
    truth = gradient_fn(workload.by_hand(jnp.float64))
    with jax.enable_x64(True):
        truths = [truth(*cast(a, np.float64)) for a in args]
    errors = lambda fn: [
        relative_error(fn(*a), t) for a, t in zip(args, truths, strict=True)
    ]
    float32 = errors(gradient_fn(workload.loss_fn))
    rows = []
    for policy, (dtype, scale) in formats.items():
        fns = forms(workload, policy, dtype, scale)
        if name in DEEP_MODELS:
            del fns["inner_autocast"]
        by_form = {form: errors(fn) for form, fn in fns.items()}
        row = {"model": name, "policy": policy, "num_seeds": num_seeds}
        row |= aggregate(by_form)
        rows.append(row | {"error_float32": float(np.mean(float32))})
    return rows


def make_arguments(workload: Workload, key: jax.Array) -> tuple[Any, ...]:
    """Returns the arguments of a workload's loss function but its key.

    Args:
      workload: a real model.
      key: determines parameters and batch.
    """
    init_key, noise_key, batch_key = jax.random.split(key, 3)
    params = _with_noise(workload.init_params(init_key), noise_key)
    batch = workload.make_batch(batch_key, BATCH_SIZE)
    if workload.init_model_state is None:
        return params, batch
    return params, workload.init_model_state(init_key), batch


def gradient_fn(
    loss_fn: Callable[..., Any], *, scale: float = 1.0, policy: str | None = None
) -> Callable[..., Any]:
    """Returns `(*arguments) -> gradient`, in float64, compiled once.

    Args:
      loss_fn: as in `Workload`.
      scale: multiplies the loss; the gradient is divided by it.
      policy: autocasts the gradient, as the train step does, if not None.
    """

    def scaled(*args):
        loss, aux = loss_fn(*args, jax.random.key(0))
        return loss * scale, aux

    grad = jax.value_and_grad(scaled, has_aux=True)
    step = jax.jit(grad if policy is None else mpjax.autocast(grad, policy))

    def gradient(*args):
        _, grads = step(*args)
        return jax.tree.map(lambda g: np.asarray(g, np.float64) / scale, grads)

    return gradient


def forms(
    workload: Workload, policy: str, dtype: Any, scale: float
) -> dict[str, Callable[..., Any]]:
    """Returns the gradient functions in half, by name."""
    assert workload.by_hand is not None
    inner = mpjax.autocast(workload.loss_fn, policy)
    return {
        "by_hand": gradient_fn(workload.by_hand(dtype), scale=scale),
        "autocast": gradient_fn(workload.loss_fn, scale=scale, policy=policy),
        "inner_autocast": gradient_fn(inner, scale=scale),
    }


def aggregate(errors: dict[str, list[float]]) -> dict[str, Any]:
    """Returns means, ratios and counts; means over the seeds where all are finite."""
    is_finite = np.isfinite(list(errors.values())).all(axis=0)
    row: dict[str, Any] = {"errors": {}}
    finite = {f: np.array(e)[is_finite].tolist() for f, e in errors.items()}
    for form, values in errors.items():
        row["errors"][form] = [e if np.isfinite(e) else None for e in values]
        row[f"num_overflows_{form}"] = int(np.sum(~np.isfinite(values)))
        row[f"error_{form}"] = float(np.mean(finite[form])) if any(is_finite) else None
        if any(is_finite) and form != "by_hand":
            row[f"ratio_{form}"] = ratio_interval(finite[form], finite["by_hand"])
    return row


def _with_noise(params: Any, key: jax.Array) -> Any:
    """Adds noise to biases and scales, as if the model had been trained."""

    def add(path, x):
        nonlocal key
        if path[-1].key not in ("bias", "scale"):
            return x
        key, noise_key = jax.random.split(key)
        return x + NOISE * jax.random.normal(noise_key, x.shape)

    return jax.tree_util.tree_map_with_path(add, params)
