"""What a training step costs: interleaved step times, beside other libraries.

    python -m experiments.benchmarks.speed                 # 15 min on 2 cores
    python -m experiments.benchmarks.speed --works mlp,convnet,transformer,bigru

Every row trains the same network from the same values on the same batch; one whose loss
after three steps is not that of float32 by hand, or has not come as far, is marked as
wrong. One round times each row once, in a shuffled order, so that whatever else the
machine does hits all alike; ratios are medians over rounds of the ratio within a round.
Where a step is short, as on a GPU, what is timed is as many steps in a row as take some
50 ms. Named and left out are libraries that are not installed
(`pip install -e ".[bench]"`), rows that fail to compile or to take their first steps,
and, unless asked for by `--rows`, those that take over 20 s and 20 times float32's time
to compile and take the first. Differences of a few per cent between rows can be those
between two compilations of one step.
"""

import dataclasses
import math
import random
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from experiments.benchmarks.baselines import (
    by_hand,
    flax,
    keras,
    mpjax,
    mpx,
    torch,
    tuned,
)
from experiments.benchmarks.baselines.baseline import FLOAT32, Case, Row, Step
from experiments.benchmarks.baselines.warmup import Started, is_right, start_all
from experiments.benchmarks.workloads import WORKS, mlp
from experiments.harness import cli, results
from experiments.harness.config import require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.files import atomic_write, write_json
from experiments.harness.plots import DPI
from experiments.harness.results import Column

NAME = "benchmark"
PEERS = ("keras", "mixed-precision-for-jax", "torch")
MIN_TIMED_S = 0.05
MAX_STEPS = 100  # at a time


def digits(ms: float) -> str:
    """A time with four digits, and never an exponent."""
    return f"{ms:.{max(0, 3 - math.floor(math.log10(max(ms, 1e-3))))}f}"


def _from_to(quartiles_ms: list[float]) -> str:
    return " to ".join(map(digits, quartiles_ms))


COLUMNS = (
    Column("row", "name"),
    Column("ms/step, median", "median_ms", digits),
    Column("quartiles", "quartiles_ms", _from_to),
    Column("times float32", "speedup", "{:.2f}"),
    Column("ratio", "ratio", "{:.3f}"),
    Column("to", "reference"),
    Column("temporaries, MB", "temporary_mb", "{:,.0f}"),
    Column("loss", "loss_after", "{:.4f}"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to time."""

    works: str = "mlp"
    """The models, separated by commas: mlp, convnet, transformer_block, transformer,
    bigru."""

    rows: str = ""
    """A regular expression; only rows whose name it is found in, and those they are
    compared with. Empty for all."""

    batch_size: int | None = None
    """Examples per step; the model's own for a CPU or GPU by default."""

    num_units: int = 4096
    """Units in each of the two hidden layers of the MLP."""

    num_rounds: int = 11
    """How often each row is timed."""

    seed: int = 0
    """Of parameters, data and order."""

    max_minutes: float | None = None
    """After so many minutes of compiling per model the rows still to come are left out;
    no limit by default."""

    output_dir: Path | None = None
    """Where result files go; experiments/results by default."""

    def __post_init__(self):
        require_positive(self, "num_units", "num_rounds")
        for name in ("batch_size", "max_minutes"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        unknown = [work for work in self.work_names() if work not in WORKS]
        if unknown:
            raise ConfigError(
                f"--works must be some of {', '.join(WORKS)}, "
                f"got {', '.join(unknown)!r}."
            )
        try:
            re.compile(self.rows)
        except re.error as error:
            raise ConfigError(f"--rows is no regular expression: {error}.") from error

    def work_names(self) -> list[str]:
        """Returns the names of the models."""
        return [name.strip() for name in self.works.split(",")]


def main(config: Config) -> list[dict[str, Any]]:
    """Times every row of every model; returns what the result files hold."""
    # Before its files make the tree another.
    environment = results.environment((*results.PACKAGES, *PEERS))
    return [_one_work(config, name, environment) for name in config.work_names()]


def all_rows() -> list[Row]:
    """Returns every row, those that others are compared with first."""
    modules = (
        by_hand,
        mpjax,
        flax,
        mpx,
        keras,
        torch,
        tuned,
    )
    return [row for module in modules for row in module.rows()]


def choose(
    rows: list[Row], work: str, pattern: str, platform: str = "cpu"
) -> tuple[list[Row], dict[str, str]]:
    """Returns the rows to time, and those left out with the remedy.

    Raises:
      ConfigError: if the pattern is found in no row.
    """
    possible = [
        row
        for row in rows
        if (row.works is None or work in row.works) and row.platform in (None, platform)
    ]
    wanted = {row.name for row in possible if re.search(pattern, row.name)}
    if not wanted:
        raise ConfigError(
            f"--rows {pattern!r} is found in no row of {work}; there are "
            f"{'; '.join(row.name for row in possible)}."
        )
    references = {row.name: row.reference for row in possible}
    while not {references[name] for name in wanted} <= wanted:
        wanted |= {references[name] for name in wanted}
    chosen = [row for row in possible if row.name in wanted | {FLOAT32}]
    left_out = {
        row.name: row.needs[1] for row in chosen if row.needs and not row.is_installed()
    }
    return [row for row in chosen if row.name not in left_out], left_out


def _one_work(
    config: Config, work_name: str, environment: dict[str, Any]
) -> dict[str, Any]:
    work = mlp(config.num_units) if work_name == "mlp" else WORKS[work_name]()
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    batch_size = config.batch_size or work.batch_sizes[platform]
    keys = jax.random.split(jax.random.key(config.seed))
    case = Case(work, work.init_params(keys[0]), work.make_batch(keys[1], batch_size))
    rows, left_out = choose(all_rows(), work_name, config.rows, platform)
    started, failures = start_all(
        rows, case, is_patient=bool(config.rows), max_minutes=config.max_minutes
    )
    left_out |= failures
    for name, reason in left_out.items():
        print(f"left out: {name}; {reason}")
    rows = [row for row in rows if row.name in started]
    steps = {name: begun.step for name, begun in started.items()}
    num_steps = {name: _num_steps(step) for name, step in steps.items()}
    times_ms = time_rounds(steps, config.num_rounds, config.seed, num_steps)
    table = {
        "experiment": NAME,
        "work": work_name,
        "title": work.title,
        "batch_size": batch_size,
        "num_rounds": config.num_rounds,
        "seed": config.seed,
        "environment": environment,
        "left_out": left_out,
        "runs": [
            summary(row, times_ms, started) | {"num_steps_timed": num_steps[row.name]}
            for row in rows
        ],
    }
    _write(config, table)
    return table


def _num_steps(step: Step) -> int:
    """How many steps take long enough to be timed."""
    num_steps = 1
    for _ in range(2):  # Of several in a row each is shorter than one that is alone.
        seconds = max(_seconds(step, num_steps) / num_steps, 1e-9)
        num_steps = min(MAX_STEPS, math.ceil(MIN_TIMED_S / seconds))
        if num_steps == 1:
            break
    return num_steps


def _seconds(step: Step, num_steps: int) -> float:
    start = time.perf_counter()
    step.run(num_steps)
    return time.perf_counter() - start


def time_rounds(
    steps: dict[str, Step],
    num_rounds: int,
    seed: int,
    num_steps: dict[str, int] | None = None,
) -> dict[str, list[float]]:
    """Returns milliseconds per step, row and round; each round in an order of its own.

    Args:
      steps: by name.
      num_rounds: how often each is timed.
      seed: of the orders.
      num_steps: how many are timed at once; one each by default.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(seed).shuffle
    for _ in tqdm(range(num_rounds), desc="rounds", disable=None):
        shuffle(order)
        for name in order:
            num = num_steps[name] if num_steps else 1
            times_ms[name].append(1000 * _seconds(steps[name], num) / num)
    return times_ms


def summary(
    row: Row, times_ms: dict[str, list[float]], started: dict[str, Started]
) -> dict[str, Any]:
    """Returns a row of the table; see COLUMNS."""
    times = times_ms[row.name]
    begun = started[row.name]
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    to_float32 = _median_ratio(times_ms[FLOAT32], times)
    has_reference = row.reference in times_ms and row.reference != row.name
    ratio = _median_ratio(times, times_ms[row.reference]) if has_reference else None
    memory = begun.step.temporary_bytes
    return {
        "name": row.name,
        "median_ms": statistics.median(times),
        "quartiles_ms": [quartiles[0], quartiles[-1]],
        "speedup": to_float32,
        "ratio": ratio,
        "reference": row.reference if has_reference else "-",
        "temporary_mb": None if memory is None else memory / 1e6,
        "first_s": round(begun.first_s, 2),
        "loss_before": begun.losses[0],
        "loss_after": begun.losses[1],
        "is_right": is_right(begun.losses, started[FLOAT32].losses),
        "times_ms": [round(t, 3) for t in times],
    }


def _median_ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def _write(config: Config, table: dict[str, Any]) -> None:
    environment, runs = table["environment"], table["runs"]
    directory = config.output_dir or Path(__file__).parents[1] / "results"
    directory.mkdir(parents=True, exist_ok=True)
    file = f"{NAME}_{table['work']}_{environment['machine']}_jax{jax.__version__}.json"
    write_json(directory / file, table)
    title = f"{table['title']}, batch {table['batch_size']}, {environment['device']}, "
    title += f"jax {jax.__version__}"
    draw((directory / file).with_suffix(".png"), title, runs)
    precision = environment["float32_matmul_precision"]
    results.print_table(f"{title}, float32 matmul {precision}", COLUMNS, runs)
    for run in runs:
        if not run["is_right"]:
            losses = f"{run['loss_before']:.4f} to {run['loss_after']:.4f}"
            print(f"wrong: the loss of {run['name']} went from {losses}")


def draw(path: Path, title: str, runs: list[dict[str, Any]]) -> None:
    """Draws the median step time of each row, with quartiles, fastest first."""
    runs = sorted(runs, key=lambda run: run["median_ms"], reverse=True)
    figure = Figure(figsize=(9, 0.32 * len(runs) + 1.4), layout="constrained")
    axes = figure.subplots()
    colours = {"float16": "C1", "bfloat16": "C2"}
    for place, run in enumerate(runs):
        half = next((h for h in ("bfloat16", "float16") if h in run["name"]), None)
        times, median = run["times_ms"], run["median_ms"]
        low, _, high = statistics.quantiles(times * 2, n=4)
        axes.barh(
            place,
            median,
            color=colours.get(half or "", "C0"),
            alpha=1.0 if run["name"].startswith("mpjax") else 0.5,
            xerr=[[max(median - low, 0)], [max(high - median, 0)]],
            error_kw={"lw": 1, "ecolor": "0.3"},
        )
        axes.annotate(
            f" {digits(median)}", (max(high, median), place), va="center", fontsize=8
        )
    axes.set_yticks(range(len(runs)), [run["name"] for run in runs], fontsize=8)
    axes.set_xlabel("median ms per step, whiskers: quartiles")
    figure.suptitle(f"{title}\n(full colour: mpjax)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.01)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")


if __name__ == "__main__":
    cli.run(main, Config, doc=__doc__)
