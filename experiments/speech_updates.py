"""What float32 master weights are for: Mandarin speech updated in float16.

    python -m experiments.speech_updates --workdir runs/updates
    python -m experiments.speech_updates --workdir runs/updates --resume
    python -m experiments.speech_updates --setting small_updates --workdir runs/small

Section 3.1 and Figure 2 of "Mixed Precision Training" (arXiv:1710.03740): on a Mandarin
speech model, updating float16 weights in float16 raised the error rate by 80 %, and
float32 master weights matched float32. Trains the network of `speech_ctc` in seven
ways, with the same seeds and data, and compares character error rates by seed. The
default size, 3,200 utterances and 4 epochs, is meant for 100 s a run on 2 CPU cores;
with JAX_COMPILATION_CACHE_DIR set, only the first seed compiles.

An update is lost in float16 where it is less than about a 2048th of its weight, or
below 2^-24. Every run counts, for each parameter, what share of its updates is lost, or
would be if its weights were float16. Where that share is small, float16 updates can do
little harm. `--setting small_updates` is for the opposite case: a 16th of the learning
rates, and 4 times the epochs. A weight of 0.1 has neighbours in float16 2^-14 away, and
moves only for an update above 2^-15, or 3e-5. With Nesterov momentum 89 % of the
updates were lost there, with 48 % of their magnitude.
"""

from experiments.configs.speech_updates import VARIANTS, Cell, Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.speech_updates", Config, doc=__doc__)

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from matplotlib.figure import Figure

import mpjax
from experiments import speech_ctc
from experiments.data.speech.corpus import Corpus
from experiments.harness import results
from experiments.harness.experiment import Experiment, Task
from experiments.harness.files import translate_os_errors, write_text
from experiments.harness.float16_updates import with_float16_updates
from experiments.harness.output import RESULTS, save_figure, save_table
from experiments.harness.results import markdown_table
from experiments.harness.training import train_policy, train_variant
from experiments.harness.update_plots import updates_figure
from experiments.harness.update_tracking import read_tracked, track_updates
from experiments.speech_updates_table import COLUMNS, summarize

NAME = "speech_updates"
PAPER_SMALL_GRADIENTS = 0.05  # Figure 2b: weight gradients below 2^-24

Wrapper = Callable[[optax.GradientTransformation, int], optax.GradientTransformation]
# `(tx, seed) -> tx`: how variants update weights; the others leave it to the optimizer.
WRAPPERS: dict[str, Wrapper] = {
    "float16_updates": lambda tx, seed: with_float16_updates(tx),
    "float16_stochastic": lambda tx, seed: mpjax.with_stochastic_rounding(
        tx, seed=seed
    ),
    "float16_master": lambda tx, seed: mpjax.with_master_weights(tx),
}


def main(config: Config, corpus: Corpus | None = None) -> dict[str, Any]:
    """Trains what is missing, and writes the table and the plot.

    Args:
      config: the settings.
      corpus: the corpus, instead of the one that the config names.

    Returns:
      What the result file holds; its `runs` have a row per optimizer and variant.

    Raises:
      ExperimentError: for data, files or checkpoints that fail, or after a signal;
        finished runs are kept.
    """
    corpus = corpus or config.load_corpus()
    experiment = speech_ctc.make_experiment(has_words=corpus.has_words)
    experiment = dataclasses.replace(experiment, name=NAME)
    cells = {cell.name: cell for cell in config.cells()}

    def train_one(config, name, directory):
        return _train(experiment, config, corpus, cells[name], directory)

    result = results.run_policies(NAME, config, train_one, list(cells))
    rows = summarize(result.runs, config.variants())
    table = {
        "experiment": NAME,
        "title": f"{corpus.name}, {config.encoder}, setting {config.setting}",
        "config": result.config,
        "environment": result.environment,
        "runs": rows,
    }
    _save(config, result.workdir, table)
    return table


def draw(table: dict[str, Any]) -> Figure:
    """Draws error rates, gradient exponents and lost updates.

    Args:
      table: what the result file holds.
    """
    return updates_figure(
        table["runs"],
        title=_title(table),
        error_title="validation CER",
        shown="float16_updates",
        paper=PAPER_SMALL_GRADIENTS,
    )


def _title(table: dict[str, Any]) -> str:
    """Returns the title, which older files leave to their settings."""
    config = table["config"]
    title = f"{config['dataset']}, {config['encoder']}, setting {config['setting']}"
    return table.get("title", title)


def _train(
    experiment: Experiment, config: Config, corpus: Corpus, cell: Cell, directory: Path
) -> dict[str, Any]:
    """Trains one run; where the gradients stay non-finite, that is its result."""
    run_config, variant = config.run_config(cell), VARIANTS[cell.variant]
    model, prepared = speech_ctc.make_model(run_config, corpus)
    task = speech_ctc.make_task(
        run_config,
        variant.policy,
        model,
        prepared,
        has_words=corpus.has_words,
    )
    task = _with_updates(task, cell, config.weight_scale)

    def train() -> dict[str, Any]:
        return train_policy(experiment, task, run_config, variant.policy, directory)[0]

    run, rows = train_variant(train, cell.name, variant, directory)
    select = lambda kind: [row for row in rows if row["kind"] == kind]
    return {
        **run,
        **cell._asdict(),
        "learning_rate": run_config.learning_rate,
        "val_errors": [row["val_cer"] for row in select("epoch")],
        "observed": _without_early_histograms(select("observed")),
    }


def _without_early_histograms(observed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows with the histogram in the last alone: it is a running sum."""
    early = [{k: v for k, v in x.items() if k != "gradients"} for x in observed[:-1]]
    return early + observed[-1:]


def _with_updates(task: Task, cell: Cell, weight_scale: float) -> Task:
    """Returns the task with tracked updates, applied as the variant says."""
    tx = track_updates(task.tx)
    if wrap := WRAPPERS.get(cell.variant):
        tx = wrap(tx, cell.seed)

    def init(key):
        params, model_state = task.init(key)
        scale = lambda x: x * weight_scale if x.ndim > 1 else x
        return jax.tree.map(scale, params), model_state

    return dataclasses.replace(
        task,
        tx=tx,
        init=init,
        observe=lambda state: read_tracked(state.opt_state, state.params),
    )


def _save(config: Config, workdir: Path, table: dict[str, Any]) -> None:
    environment, suffix, title = table["environment"], "", _title(table)
    if config.setting != "default":
        suffix = f"_{config.setting}"
    machine, version = environment["machine"], environment["versions"]["jax"]
    file = f"{NAME}{suffix}_{machine}_jax{version}.json"
    output = config.output or RESULTS / file
    save_table(output, table, title, COLUMNS)
    save_figure(output.with_suffix(".png"), draw(table))
    with translate_os_errors(workdir):
        text = f"{title}\n\n{markdown_table(COLUMNS, table['runs'])}"
        write_text(workdir / "result.md", text)
