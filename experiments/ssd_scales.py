"""Loss scales in float16 on a single-shot detector, beside float32 and bfloat16.

    python -m experiments.ssd_scales --workdir runs/scales
    python -m experiments.ssd_scales --workdir runs/scales --resume
    python -m experiments.ssd_scales --setting small_gradients --workdir runs/small

Section 3.2 and Figure 3 of "Mixed Precision Training" (arXiv:1710.03740): most
activation gradients of an SSD are zero or below float16's range; unscaled it diverges,
and a scale of 8 matches float32. Trains the network of `ssd_digits` in float32, in
mixed_float16 unscaled, at scales of 8, 128 and 1024, with dynamic scaling and by
histograms, and in mixed_bfloat16, with the same seeds, initial parameters and data
order, and compares mean average precisions by seed. The default size, 2,000 scenes and
3 epochs, is meant for at most 90 s a run on 2 CPU cores; with JAX_COMPILATION_CACHE_DIR
set, only the first seed compiles.

Every run counts its activation gradients. Those of float32's first seed are drawn as in
Figure 3, in a second result file. `--setting small_gradients` is another setting, made
so that gradients are small: a deeper trunk, a loss divided by default boxes times
batch and by 256 besides, and a batch half as large again.
"""

from experiments.configs.ssd_scales import VARIANTS, Cell, Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.ssd_scales", Config, doc=__doc__)

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments import ssd_digits
from experiments.data.detection.examples import DetectionDataset
from experiments.harness import results
from experiments.harness.experiment import Experiment
from experiments.harness.files import translate_os_errors, write_text
from experiments.harness.gradient_plots import gradients_figure
from experiments.harness.gradient_report import gradients_table
from experiments.harness.gradient_summary import COLUMNS as GRADIENTS_COLUMNS
from experiments.harness.gradient_summary import lost_share, zero_share
from experiments.harness.output import RESULTS, save_figure, save_table
from experiments.harness.recorder import read_rows
from experiments.harness.results import Result, markdown_table
from experiments.harness.training import train_variant
from experiments.models.detection.scale_plots import scales_figure
from experiments.ssd_scales_table import BASELINE, COLUMNS, summarize

NAME = "ssd_scales"


def main(config: Config, dataset: DetectionDataset | None = None) -> dict[str, Any]:
    """Trains what is missing, and writes tables and plots.

    Args:
      config: the settings.
      dataset: the images, instead of those that the config names.

    Returns:
      What the result file holds; its `runs` have a row per variant.

    Raises:
      ExperimentError: for data, files or checkpoints that fail, or after a signal;
        finished runs are kept.
    """
    dataset = dataset or config.load_images(config.architecture().image_size)
    has_coco = config.dataset == "coco"
    experiment = ssd_digits.make_experiment(has_coco=has_coco, name=NAME)
    cells = {cell.name: cell for cell in config.cells()}

    def train_one(config, name, directory):
        return _train(experiment, config, dataset, cells[name], directory)

    result = results.run_policies(NAME, config, train_one, list(cells))
    runs = [_with_gradients(run, result.workdir) for run in result.runs]
    table = {
        "experiment": NAME,
        "title": f"{dataset.name}, SSD {config.preset}, setting {config.setting}",
        "config": result.config,
        "environment": result.environment,
        "runs": summarize(
            runs, config.variant_names(), beside_papers=config.setting == "default"
        ),
    }
    _save(config, result, table)
    return table


def draw(table: dict[str, Any]) -> Figure:
    """Draws precisions, and their differences to float32.

    Args:
      table: what the result file holds.
    """
    return scales_figure(table["title"], table["runs"])


def draw_gradients(table: dict[str, Any]) -> Figure:
    """Draws activation gradients as figure 3 of the paper.

    Args:
      table: what the file of gradients holds.
    """
    return gradients_figure(table["title"], table)


def _train(
    experiment: Experiment,
    config: Config,
    dataset: DetectionDataset,
    cell: Cell,
    directory: Path,
) -> dict[str, Any]:
    """Trains one run; where the gradients stay non-finite, that is its result."""
    run_config, variant = config.run_config(cell), VARIANTS[cell.variant]

    def train() -> dict[str, Any]:
        return ssd_digits.train(
            experiment, run_config, variant.policy, dataset, directory
        )

    run, rows = train_variant(train, cell.name, variant, directory)
    maps = [row["val_map07"] for row in rows if row["kind"] == "epoch"]
    return {**run, **cell._asdict(), "val_map07s": maps}


def _with_gradients(run: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """Returns a run with the shares of its activation gradients that are lost.

    `zero_gradients` are those that are zero as computed; `lost_gradients` are, of the
    nonzero ones of the same seed's run in float32, those that float16 would flush to
    zero at the loss scale that this run had at the time.
    """
    read = lambda cell: read_rows(workdir / cell.name / "metrics.jsonl")
    rows = read(Cell(run["variant"], run["seed"]))
    lost = None
    if VARIANTS[run["variant"]].policy == "mixed_float16":
        scales = {r["step"]: r["loss_scale"] for r in rows if r["kind"] == "train"}
        lost = lost_share(read(Cell(BASELINE, run["seed"])), scales)
    return {**run, "zero_gradients": zero_share(rows), "lost_gradients": lost}


def _save(config: Config, result: Result, table: dict[str, Any]) -> None:
    environment, title = table["environment"], table["title"]
    suffix = "" if config.setting == "default" else f"_{config.setting}"
    machine, version = environment["machine"], environment["versions"]["jax"]
    file = f"{NAME}{suffix}_{machine}_jax{version}.json"
    output = config.output or RESULTS / file
    save_table(output, table, title, COLUMNS)
    save_figure(output.with_suffix(".png"), draw(table))
    texts = [markdown_table(COLUMNS, table["runs"])]
    rows = read_rows(
        result.workdir / Cell(BASELINE, config.seed).name / "metrics.jsonl"
    )
    if any(row["kind"] == "numerics" for row in rows):
        title = f"{title}, float32"
        gradients = gradients_table(ssd_digits.GRADIENTS_NAME, title, environment, rows)
        path = output.with_stem(f"{output.stem}_gradients")
        save_table(path, gradients, title, GRADIENTS_COLUMNS)
        save_figure(path.with_suffix(".png"), draw_gradients(gradients))
        texts.append(markdown_table(GRADIENTS_COLUMNS, gradients["runs"]))
    with translate_os_errors(result.workdir):
        text = "\n".join((f"{table['title']}\n", *texts))
        write_text(result.workdir / "result.md", text)
