"""Gradient errors in float8, beside bfloat16 and beside flax's float8.

The models are those of `experiments.models.small`, two language models of `real_models`
at their small sizes, and an MLP wide enough for `mixed_float8` to run in float8 by its
rule. flax multiplies in float8 by `Fp8DotGeneralOp`, by hand in a Linen module. Its
scales are delayed: those of a step follow from the magnitudes of earlier steps, and are
1 in the first, where there are none. So its gradient is taken twice: in the first step,
and after some steps on the same batch and parameters.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import mpjax
from experiments.benchmarks import _accuracy_real
from experiments.harness.intervals import interval_text, ratio_interval
from experiments.harness.results import Column
from experiments.models import small

NAME = "accuracy_float8"
BASELINE = "mixed_bfloat16"
RULE, ALL_SIZES = "mixed_float8", "mixed_float8:all"
NUM_UPDATES = 5  # steps in which flax's scales settle
WIDE: dict[str, Any] = {"batch_size": 4096, "sizes": (2048, 2048, 2048, 10)}
REAL_MODELS = ("gpt2", "llama")
MLPS: dict[str, Callable[..., small.Case]] = {
    "mlp": small.mlp,
    "mlp, 2048 wide": functools.partial(small.mlp, **WIDE),
}
CASES = {**small.CASES, **MLPS}
COLUMNS = (
    Column("model", "model"),
    Column("precision", "precision"),
    Column("error", "error", "{:.2e}"),
    Column("to bfloat16", "ratio", interval_text),
)


def measure(num_seeds: int) -> list[dict[str, Any]]:
    """Returns the rows of all models, one per precision.

    Args:
      num_seeds: how many seeds for parameters and inputs.
    """
    rows = []
    with warnings.catch_warnings():
        # A CPU multiplies the same numbers in a wider format, as is meant here.
        warnings.filterwarnings("ignore", message="mixed_float8:")
        for name in tqdm((*CASES, *REAL_MODELS), desc="models", disable=None):
            measure_model = _measure_case if name in CASES else _measure_real
            rows += _rows(name, measure_model(name, num_seeds))
    return rows


def _rows(name: str, errors: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns a row per precision, from its errors by seed."""
    baseline = errors[BASELINE]
    return [
        {
            "model": name,
            "precision": precision,
            "num_seeds": len(own),
            "error": float(np.mean(own)),
            "errors": own,
            "ratio": None if own is baseline else ratio_interval(own, baseline),
        }
        for precision, own in errors.items()
    ]


def _measure_case(name: str, num_seeds: int) -> dict[str, list[float]]:
    """Returns the errors by precision; the rule's only where it gives float8."""
    cases = [CASES[name](seed) for seed in range(num_seeds)]
    truths = [small.oracle(case) for case in cases]

    def errors(gradient):
        pairs = zip(cases, truths, strict=True)
        return [small.relative_error(gradient(case), truth) for case, truth in pairs]

    policies = [BASELINE, RULE, ALL_SIZES]
    if not _has_float8(cases[0]):
        policies.remove(RULE)
    found = {
        policy: errors(
            lambda c, p=policy: small.autocast_gradient(c.loss, c.params, c.inputs, p)
        )
        for policy in policies
    }
    if name in MLPS:
        for text, num_updates in (
            ("first step", 0),
            (f"after {NUM_UPDATES} steps", NUM_UPDATES),
        ):
            found[f"flax Fp8DotGeneralOp, {text}"] = errors(
                lambda c, n=num_updates: flax_gradient(CASES[name], c, n)
            )
    return found


def _has_float8(case: small.Case) -> bool:
    """Whether a matmul of the loss runs in float8 by the rule."""
    report = mpjax.autocast_report(case.loss, RULE)(case.params, case.inputs)
    return any(record.dtype == "float8" for record in report.records)


def _measure_real(name: str, num_seeds: int) -> dict[str, list[float]]:
    """Returns the errors by precision; these models are too small for the rule."""
    workload = _accuracy_real.MODELS[name]()
    assert workload.by_hand is not None
    truth_fn = _accuracy_real.gradient_fn(workload.by_hand(jnp.float64))
    fns = {
        policy: _accuracy_real.gradient_fn(workload.loss_fn, policy=policy)
        for policy in (BASELINE, ALL_SIZES)
    }
    found: dict[str, list[float]] = {policy: [] for policy in fns}
    for seed in range(num_seeds):
        key = jax.random.key(seed)
        args = jax.device_get(_accuracy_real.make_arguments(workload, key))
        with jax.enable_x64(True):
            truth = truth_fn(*small.cast(args, np.float64))
        for policy, fn in fns.items():
            found[policy].append(small.relative_error(fn(*args), truth))
    return found


class Fp8Loss(nn.Module):
    """The loss of a case in bfloat16, with flax's float8 matmuls.

    Attributes:
      make_case: `(matmul=...) -> case`.
    """

    make_case: Callable[..., small.Case]

    @nn.compact
    def __call__(self, params: Any, inputs: Any) -> jax.Array:
        """Returns the loss; the state of the scales is in the module's variables."""

        def matmul(x, w):
            numbers = (((x.ndim - 1,), (0,)), ((), ()))
            return nn.Fp8DotGeneralOp()(x, w, numbers)

        loss = self.make_case(matmul=matmul).loss
        return loss(small.cast(params, jnp.bfloat16), small.cast(inputs, jnp.bfloat16))


def flax_gradient(
    make_case: Callable[..., small.Case], case: small.Case, num_updates: int
) -> Any:
    """Returns the gradient in flax's float8, in float64.

    Args:
      make_case: makes such cases, as in `Fp8Loss`.
      case: parameters and inputs.
      num_updates: how often the scales were updated before, on the same batch and
        parameters.
    """
    model = Fp8Loss(make_case)

    def loss(params, scales, inputs):
        return model.apply(scales, params, inputs)

    with warnings.catch_warnings():
        # Its successor differs in how it multiplies, which this CPU does not do.
        warnings.filterwarnings("ignore", "The Fp8DotGeneralOp", DeprecationWarning)
        scales = jax.jit(model.init)(jax.random.key(0), case.params, case.inputs)
        # The "gradient" of flax's scales and magnitudes is what replaces them.
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        for _ in range(num_updates):
            _, scales = step(case.params, scales, case.inputs)
        grads, _ = step(case.params, scales, case.inputs)
    return small.cast(jax.device_get(grads), np.float64)
