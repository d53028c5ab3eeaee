"""Autocast beside casting by hand: how true the gradient is, and step times.

    python -m experiments.benchmarks.accuracy                  # 4 min on 2 CPU cores

Eight small models (`experiments.models.small`), in bfloat16 and float16. The error of
a gradient is that against float64, ||g - g64|| / ||g64||, the mean over seeds; in
float16 it is taken through a loss scaled by 2**10. Times are of a jitted gradient,
interleaved: the ratio is the median over rounds of the ratio within a round.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm.auto import tqdm

import mpjax
from experiments.harness import cli, results
from experiments.harness.config import require_positive
from experiments.harness.files import write_json
from experiments.harness.results import Column
from experiments.models import small

NAME = "autocast"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How much to measure."""

    num_seeds: int = 3
    """Seeds 0, 1, … of parameters and inputs, over which errors are averaged."""

    num_rounds: int = 21
    """How often each gradient is timed."""

    output: Path | None = None
    """The result file; a name in experiments/results by default."""

    def __post_init__(self):
        require_positive(self, "num_seeds", "num_rounds")


def main(config: Config) -> dict[str, Any]:
    """Measures every model and writes the table; returns what the file holds."""
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
    output = config.output or Path(__file__).parents[1] / "results" / file
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, table)
    results.print_table(f"autocast, {machine}, jax {jax.__version__}", COLUMNS, rows)
    return table


def _forms(policy: str, dtype: Any, scale: float) -> dict[str, Callable[[Any], Any]]:
    """The gradient of a case in each form, by the name of its column."""
    by_case = lambda c: (c.loss, c.params, c.inputs)
    return {
        "error_float32": lambda c: small.gradient(*by_case(c)),
        "error_hand_cast": lambda c: small.gradient(
            small.hand_cast(c.loss, dtype), c.params, c.inputs, scale=scale
        ),
        "error_autocast": lambda c: small.autocast_gradient(
            *by_case(c), policy, scale=scale
        ),
        "error_inner_autocast": lambda c: small.inner_autocast_gradient(
            *by_case(c), policy, scale=scale
        ),
    }


def _error(gradient: Callable[[Any], Any], cases: list, truths: list) -> float:
    pairs = zip(cases, truths, strict=True)
    return statistics.mean(small.relative_error(gradient(c), t) for c, t in pairs)


def _time_ratio(case: Any, policy: str, dtype: Any, num_rounds: int) -> dict[str, Any]:
    """Median step times of autocast and by hand, and the median of their ratio."""
    forms = {
        "hand_cast_ms": jax.value_and_grad(small.hand_cast(case.loss, dtype)),
        "autocast_ms": mpjax.autocast(jax.value_and_grad(case.loss), policy),
    }
    args = jax.device_put((case.params, case.inputs))
    steps = {form: jax.jit(fn).lower(*args).compile() for form, fn in forms.items()}
    times: dict[str, list[float]] = {form: [] for form in forms}
    order = [*forms]
    shuffle = random.Random(0).shuffle
    for form in order:
        jax.block_until_ready(steps[form](*args))
    for _ in range(num_rounds):
        shuffle(order)
        for form in order:
            start = time.perf_counter()
            jax.block_until_ready(steps[form](*args))
            times[form].append(1000 * (time.perf_counter() - start))
    pairs = zip(times["autocast_ms"], times["hand_cast_ms"], strict=True)
    return {
        **{form: statistics.median(values) for form, values in times.items()},
        "time_ratio": statistics.median(a / b for a, b in pairs),
    }


if __name__ == "__main__":
    cli.run(main, Config, doc=__doc__)
