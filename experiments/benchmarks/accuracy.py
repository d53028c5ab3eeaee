"""Gradient errors of autocast and of casting by hand, and their step times.

    python -m experiments.benchmarks.accuracy                  # 4 min on 2 CPU cores
    python -m experiments.benchmarks.accuracy --workloads real --num-seeds 5

Eight small models (`experiments.models.small`) in bfloat16 and float16; with
`--workloads real` the small twins of `real_models`, and deep ones; with `--workloads
float8` the small ones in float8, beside bfloat16 and flax's float8. The error is
||g - g64|| / ||g64||, where g64 is the gradient in float64, averaged over seeds; in
float16 the gradient is taken through a loss scaled by 2**10. The step times are those
of jitted gradients, interleaved: the ratio is the median over rounds of the ratio
within a round. The real models are not timed; autocast's error is divided by that by
hand, seed by seed, and the 95 % interval of the ratio's geometric mean is given.

XLA:CPU rounds operands and results of half matmuls where the CPU has none, so that the
errors are those of half hardware, the order of sums aside.
"""

from experiments.configs.accuracy import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.benchmarks.accuracy", Config, doc=__doc__)

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

import mpjax
from experiments.benchmarks import _accuracy_float8, _accuracy_real
from experiments.benchmarks._timing import median_ratio, time_rounds
from experiments.harness import results
from experiments.harness.files import read_json
from experiments.harness.output import RESULTS, save_table
from experiments.harness.results import Column
from experiments.models import small

NAME = "accuracy"
# By policy: the dtype, and the scale of the loss.
FORMATS = {
    "mixed_bfloat16": (jnp.bfloat16, 1.0),
    "mixed_float16": (jnp.float16, 2.0**10),
}
COLUMNS = (
    Column("model", "model"),
    Column("policy", "policy"),
    Column("error, float32", "error_float32", "{:.1e}"),
    Column("cast by hand", "error_hand_cast", "{:.1e}"),
    Column("autocast(grad)", "error_autocast", "{:.1e}"),
    Column("grad(autocast)", "error_inner_autocast", "{:.1e}"),
    Column("time, autocast(grad) to by hand", "time_ratio", "{:.2f}"),
)


def main(config: Config) -> dict[str, Any]:
    """Measures every model, and writes the table.

    Returns:
      What the result file holds.

    Raises:
      WorkdirError: if it cannot be written.
    """
    if config.workloads == "float8":
        return _measure_float8(config)
    if config.real_names():
        return _measure_real(config)
    rows = []
    for name in tqdm(small.CASES, desc="models", disable=None):
        cases = [small.CASES[name](seed) for seed in range(config.num_seeds)]
        truths = [small.oracle(case) for case in cases]
        for policy, (dtype, scale) in FORMATS.items():
            forms = _forms(policy, dtype, scale)
            errors = {
                form: _error(gradient, cases, truths)
                for form, gradient in forms.items()
            }
            times = _time_ratio(cases[0], policy, dtype, config.num_rounds)
            rows.append({"model": name, "policy": policy, **errors, **times})
    table = {
        "experiment": NAME,
        "num_seeds": config.num_seeds,
        "num_rounds": config.num_rounds,
        "environment": results.environment(),
        "runs": rows,
    }
    machine = table["environment"]["machine"]
    file = f"{NAME}_{machine}_jax{jax.__version__}.json"
    title = f"gradient errors, {machine}, jax {jax.__version__}"
    save_table(config.output or RESULTS / file, table, title, COLUMNS)
    return table


def _measure_float8(config: Config) -> dict[str, Any]:
    """Measures models in float8, and writes the table."""
    environment = results.environment()
    name, machine = _accuracy_float8.NAME, environment["machine"]
    table = {
        "experiment": name,
        "num_seeds": config.num_seeds,
        "environment": environment,
        "runs": _accuracy_float8.measure(config.num_seeds),
    }
    path = config.output or RESULTS / f"{name}_{machine}_jax{jax.__version__}.json"
    title = f"gradient errors in float8, {machine}"
    save_table(path, table, title, _accuracy_float8.COLUMNS)
    return table


def _measure_real(config: Config) -> dict[str, Any]:
    """Measures real models; writes the table after each, which can take minutes.

    The rows of other models in the file stay; each says at which commit it was made.
    """
    environment = results.environment()
    file = f"{_accuracy_real.NAME}_{environment['machine']}_jax{jax.__version__}.json"
    path = config.output or RESULTS / file
    rows = read_json(path)["runs"] if path.exists() else []
    table: dict[str, Any] = {}
    for name in tqdm(config.real_names(), desc="models", disable=None):
        rows = [row for row in rows if row["model"] != name]
        new = _accuracy_real.measure(name, FORMATS, config.num_seeds)
        rows += [{**row, "commit": environment["commit"]} for row in new]
        jax.clear_caches()
        order = list(_accuracy_real.MODELS)
        rows.sort(key=lambda row: order.index(row["model"]))
        table = {
            "experiment": _accuracy_real.NAME,
            "batch_size": _accuracy_real.BATCH_SIZE,
            "environment": environment,
            "runs": rows,
        }
        title = f"gradient errors of real models, {environment['machine']}"
        save_table(path, table, title, _accuracy_real.COLUMNS)
    return table


def _forms(policy: str, dtype: Any, scale: float) -> dict[str, Callable[[Any], Any]]:
    """Returns functions from a case to its gradient, by the key of their column."""
    unpack = lambda c: (c.loss, c.params, c.inputs)
    return {
        "error_float32": lambda c: small.gradient(*unpack(c)),
        "error_hand_cast": lambda c: small.gradient(
            small.hand_cast(c.loss, dtype), c.params, c.inputs, scale=scale
        ),
        "error_autocast": lambda c: small.autocast_gradient(
            *unpack(c), policy, scale=scale
        ),
        "error_inner_autocast": lambda c: small.inner_autocast_gradient(
            *unpack(c), policy, scale=scale
        ),
    }


def _error(gradient: Callable[[Any], Any], cases: list, truths: list) -> float:
    """Returns the mean over cases of the error against their true gradients."""
    pairs = zip(cases, truths, strict=True)
    return statistics.mean(small.relative_error(gradient(c), t) for c, t in pairs)


def _time_ratio(case: Any, policy: str, dtype: Any, num_rounds: int) -> dict[str, Any]:
    """Returns median step times by autocast and by hand, and their ratio."""
    forms = {
        "hand_cast_ms": jax.value_and_grad(small.hand_cast(case.loss, dtype)),
        "autocast_ms": mpjax.autocast(jax.value_and_grad(case.loss), policy),
    }
    args = jax.device_put((case.params, case.inputs))
    steps = {form: jax.jit(fn).lower(*args).compile() for form, fn in forms.items()}
    calls = {
        form: lambda step=step: jax.block_until_ready(step(*args))
        for form, step in steps.items()
    }
    for call in calls.values():
        call()
    times_ms = time_rounds(calls, num_rounds)
    return {
        **{form: statistics.median(times) for form, times in times_ms.items()},
        "time_ratio": median_ratio(times_ms["autocast_ms"], times_ms["hand_cast_ms"]),
    }
