"""What mixed precision saves of the memory of training, over batch sizes.

    python -m experiments.benchmarks.memory       # 7 min on 2 cores, no GPU needed
    python -m experiments.benchmarks.memory --device a100

Compiles whole training steps for a GPU that need not be there (`mpjax.cost`; needs
`pip install "jax[cuda13]"`, and JAX_PLATFORMS=cpu where there is no GPU) and compares
what must fit at once: parameters, optimizer state, batch and temporaries. "Mixed
Precision Training" (arXiv:1710.03740, section 3) has it that training needs roughly
half of the memory, as activations outweigh the second copy of the weights. The row
"checkpointed" keeps the matmuls without batch dimensions of the forward pass, and
computes the rest again.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tqdm.auto import tqdm

import mpjax
from experiments.benchmarks.workloads import WORKS, Work
from experiments.harness import cli, results
from experiments.harness.errors import ConfigError
from experiments.harness.files import atomic_write, write_json
from experiments.harness.plots import DPI, decorate
from experiments.harness.results import Column
from mpjax import cost

NAME = "memory"
BATCH_SIZES = {
    "mlp": (512, 2048, 8192, 32768),
    "convnet": (256, 1024, 4096, 16384),
    "transformer_block": (1, 4, 16, 64),
    "transformer": (1, 4, 16, 64),
    "bigru": (16, 64, 256, 1024),
}
CHECKPOINTED = "mixed_bfloat16, checkpointed"
# The step's policy, and what its backward pass keeps of the forward pass.
ROWS: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "mixed_float16": ("mixed_float16", None),
    "mixed_bfloat16": ("mixed_bfloat16", None),
    CHECKPOINTED: ("mixed_bfloat16", "dots_with_no_batch_dims_saveable"),
}
COLUMNS = (
    Column("work", "work"),
    Column("batch", "batch_size", "{:,}"),
    Column("row", "name"),
    Column("temporaries, MB", "temporaries_mb", "{:,.1f}"),
    Column("to float32", "temporaries_ratio", "{:.3f}"),
    Column("peak, MB", "peak_mb", "{:,.1f}"),
    Column("to float32 ", "peak_ratio", "{:.3f}"),
    Column("moved, MB", "moved_mb", "{:,.0f}"),
    Column("at best, ms", "roofline_ms", "{:.3g}"),
    Column("bound by", "bound"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to compile, and for what."""

    device: str = "h100"
    """The GPU, which need not be there: a100, b200, h100, h200, v100; or "present"."""

    works: str = ",".join(BATCH_SIZES)
    """The models, separated by commas."""

    output: Path | None = None
    """The result file; a name in experiments/results by default."""

    def __post_init__(self):
        unknown = [work for work in self.work_names() if work not in WORKS]
        if unknown:
            raise ConfigError(
                f"--works must be some of {', '.join(WORKS)}, "
                f"got {', '.join(unknown)!r}."
            )
        if self.device not in ("present", *cost.device_names()):
            raise ConfigError(
                f"--device must be one of present, {', '.join(cost.device_names())}, "
                f"got {self.device!r}."
            )

    def work_names(self) -> list[str]:
        """Returns the names of the models."""
        return [name.strip() for name in self.works.split(",")]


def main(config: Config) -> dict[str, Any]:
    """Compiles every step, writes table and plot; returns what the file holds."""
    device = None if config.device == "present" else config.device
    runs = []
    cases = [(name, n) for name in config.work_names() for n in BATCH_SIZES[name]]
    for name, batch_size in tqdm(cases, desc="compiling", disable=None):
        runs += measure(name, WORKS[name](), batch_size, device)
    environment = results.environment()
    table = {
        "experiment": NAME,
        "compiled_for": cost.get_device(device).name,
        "environment": environment,
        "runs": runs,
    }
    output = config.output or Path(__file__).parents[1] / "results" / (
        f"{NAME}_{config.device}_jax{jax.__version__}.json"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, table)
    draw(output.with_suffix(".png"), table["compiled_for"], runs)
    results.print_table(f"compiled for {table['compiled_for']}", COLUMNS, runs)
    return table


def measure(
    name: str, work: Work, batch_size: int, device: str | None
) -> list[dict[str, Any]]:
    """Returns the costs of one model at one batch size, a dictionary per row."""
    batch = jax.eval_shape(lambda key: work.make_batch(key, batch_size), _key())
    runs: list[dict[str, Any]] = []
    for row, (policy, checkpoint_policy) in ROWS.items():
        step, state = make_step(work, policy, checkpoint_policy=checkpoint_policy)
        report = cost.analyze(step, state, batch, device=device)
        first = runs[0] if runs else None
        roofline_s = report.roofline_s
        run = {
            "work": name,
            "batch_size": batch_size,
            "name": row,
            "temporaries_mb": report.temporary_bytes / 1e6,
            "peak_mb": report.peak_bytes / 1e6,
            "moved_mb": report.moved_bytes / 1e6,
            "roofline_ms": None if roofline_s is None else 1e3 * roofline_s,
            "bound": report.bound,
        }
        for key in ("temporaries", "peak"):
            base = (first or run)[f"{key}_mb"]
            run[f"{key}_ratio"] = run[f"{key}_mb"] / base if base else None
        runs.append(run)
    return runs


def make_step(work: Work, policy: str, *, loss_scale: Any = None, **kwargs: Any):
    """Returns a train step of a work, and its state's shapes and dtypes.

    Args:
      work: the model.
      policy: of the step, and of the parameters it is given.
      loss_scale: dynamic if None.
      kwargs: for `make_train_step`.
    """
    tx = mpjax.with_loss_scale(work.tx, loss_scale or mpjax.DynamicLossScale())

    def init(key):
        params = mpjax.get_policy(policy).cast_to_param(work.init_params(key))
        return mpjax.TrainState.create(params=params, tx=tx)

    step = mpjax.make_train_step(work.loss_fn, tx, policy=policy, **kwargs)
    return step, jax.eval_shape(init, _key())


def draw(path: Path, device: str, runs: list[dict[str, Any]]) -> None:
    """Draws peak memory over batch size, and its ratio to float32, per model."""
    works = list(dict.fromkeys(run["work"] for run in runs))
    figure = Figure(figsize=(3.4 * len(works) + 1, 6), layout="constrained")
    figure.suptitle(f"Memory of a training step, compiled for {device}")
    axes = figure.subplots(2, len(works), squeeze=False)
    for column, work in enumerate(works):
        top, bottom = axes[:, column]
        for index, row in enumerate(ROWS):
            own = [run for run in runs if run["work"] == work and run["name"] == row]
            sizes = [run["batch_size"] for run in own]
            style = {"color": f"C{index}", "marker": "o", "ms": 4, "label": row}
            # float16 lies below bfloat16 and would be hidden.
            style |= {"lw": 4, "alpha": 0.5} if row == "mixed_float16" else {}
            top.loglog(sizes, [run["peak_mb"] for run in own], **style)
            bottom.semilogx(sizes, [run["peak_ratio"] for run in own], **style)
        decorate(top, work, None)
        decorate(bottom, "", "batch size")
        bottom.axhline(0.5, color="0.5", lw=1, ls=":")
        bottom.set_ylim(0, 1.3)
        sizes = sorted({run["batch_size"] for run in runs if run["work"] == work})
        for plot in (top, bottom):
            plot.set_xticks(sizes, [f"{n:,}" for n in sizes])
            plot.xaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("peak, MB")
    axes[1, 0].set_ylabel("to float32")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")


def _key() -> jax.Array:
    return jax.random.key(0)


if __name__ == "__main__":
    cli.run(main, Config, doc=__doc__)
