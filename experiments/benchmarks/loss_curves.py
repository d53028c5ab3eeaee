"""Losses and accuracy of training in float32, half by hand, and autocast.

    python -m experiments.benchmarks.loss_curves

Two tasks in bfloat16: a causal transformer on the bytes of Python's standard library
(every tenth file is for testing), and DeepConvNet on MNIST. Every precision has the
same initial parameters, data order and dropout, so that a seed's runs are a pair: the
difference to float32 is the mean over seeds, with its 95 % interval. Test losses are
computed in float32, from the weights that the precision trained.

The transformer's layers are unrolled, by autocast also in a scan, which carries the
residual stream in float32.

Each run is kept as soon as it ends, in a file beside the result; the same command
continues after an interruption with the runs that are missing, and then removes it.
"""

from experiments.configs.loss_curves import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.benchmarks.loss_curves", Config, doc=__doc__)

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm.auto import tqdm

import mpjax
from experiments.benchmarks import _loss_curve_tasks as tasks
from experiments.harness import plot_style, results
from experiments.harness.errors import WorkdirError
from experiments.harness.files import read_json, translate_os_errors, write_json
from experiments.harness.intervals import interval_text, mean_interval
from experiments.harness.output import (
    RESULTS,
    mean_and_deviation,
    save_figure,
    save_table,
)
from experiments.harness.plot_style import decorate
from experiments.harness.results import Column

NAME = "loss_curves"
NUM_POINTS = 40  # of a curve of training losses
COLUMNS = (
    Column("task", "task"),
    Column("precision", "precision"),
    Column("test loss", "test_loss"),
    Column(
        "minus float32",
        "loss_difference",
        lambda interval: interval_text(interval, "{:+.4f}"),
    ),
    Column("test accuracy", "test_accuracy"),
    Column(
        "minus float32 ",
        "accuracy_difference",
        lambda interval: interval_text(interval, "{:+.4f}"),
    ),
    Column("skipped steps", "num_skipped"),
)


def transformer(config: Config) -> tasks.Task:
    """Returns the transformer of the settings."""
    return tasks.transformer(
        width=config.width,
        num_layers=config.num_layers,
        length=config.length,
        batch_size=config.batch_size,
        num_steps=config.num_steps,
    )


def convnet(config: Config) -> tasks.Task:
    """Returns the convnet of the settings, with batches of 128."""
    return tasks.convnet(
        dataset=config.dataset,
        num_images=config.num_images,
        batch_size=128,
        num_epochs=config.num_epochs,
    )


TASKS: dict[str, Callable[[Config], tasks.Task]] = {
    "transformer": transformer,
    "convnet": convnet,
}


def main(config: Config) -> dict[str, Any]:
    """Trains every task in every precision; writes the table and the plot.

    Returns:
      What the result file holds.

    Raises:
      DataError: if the data are unavailable.
      WorkdirError: if the result cannot be written.
    """
    environment = results.environment()
    machine = environment["machine"]
    file = f"{NAME}_{machine}_jax{jax.__version__}.json"
    output = config.output or RESULTS / file
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "output"}
    kept = KeptRuns(output.with_suffix(".runs"), settings, environment["commit"])
    rows, facts = [], {}
    for name in config.task_names():
        task = TASKS[name](config)
        facts[name] = {"num_steps": task.num_steps, **task.facts}
        runs = train_task(task, config.num_seeds, config.num_evals, kept)
        own = [_aggregate(name, runs[name], runs["float32"]) for name in runs]
        rows += [{"task": task.title, **row} for row in own]
    table = {
        "experiment": NAME,
        **settings,
        "data": facts,
        "commits": kept.commits(),
        "environment": environment,
        "runs": rows,
    }
    save_table(output, table, f"loss curves, {tasks.POLICY}, {machine}", COLUMNS)
    save_figure(output.with_suffix(".png"), draw(table))
    kept.remove()
    return table


def draw(table: dict[str, Any]) -> Figure:
    """Draws losses over steps, and their differences to float32 beneath, by task.

    Args:
      table: what the result file holds.
    """
    rows = table["runs"]
    titles = list(dict.fromkeys(row["task"] for row in rows))
    num_seeds = len(rows[0]["test_losses"])
    title = f"Training in {tasks.POLICY}: mean of {num_seeds} seeds"
    figure = plot_style.new_figure(5.6, title, 1.5 + 3.6 * len(titles))
    panels = figure.subplots(
        2, len(titles), sharex="col", squeeze=False, height_ratios=(3, 2)
    )
    for text, (losses, differences) in zip(titles, panels.T, strict=True):
        of_task = [row for row in rows if row["task"] == text]
        reference = np.array(of_task[0]["test_losses"])
        styles = plot_style.line_styles([row["precision"] for row in of_task])
        for row in of_task:
            style, test = styles[row["precision"]], np.array(row["test_losses"])
            means = np.mean(row["train_losses"], axis=0)
            losses.plot(row["train_steps"], means, **plot_style.faint(style))
            dots = plot_style.dots(style)
            losses.plot(row["test_steps"], test.mean(axis=0), **dots)
            _draw_intervals(differences, row["test_steps"], test - reference, dots)
        decorate(losses, f"{text}:\ntest loss (faint: training)", None, "loss")
        text = "test loss minus float32's, 95 % intervals"
        decorate(differences, text, "step", "difference")
        plot_style.count_axis(differences.xaxis)
        plot_style.log_axis(losses.yaxis)
        plot_style.number_axis(differences.yaxis, signed=True)
    plot_style.label_ends(*panels.flat)
    return figure


def _draw_intervals(axes: Axes, steps: Any, differences: Any, style: Any) -> None:
    means, lows, highs = np.transpose([mean_interval(list(d)) for d in differences.T])
    axes.plot(steps, means, **style)
    axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.15, lw=0)


class KeptRuns:
    """The runs that have ended, in a file that outlives an interruption.

    Args:
      path: the file.
      settings: what decides the runs' numbers; runs of other settings are refused.
      commit: where the runs of this process are made.

    Raises:
      WorkdirError: if the file holds runs of other settings, or cannot be read.
    """

    def __init__(self, path: Path, settings: dict[str, Any], commit: str | None):
        self._path = path
        self._settings = {k: v for k, v in settings.items() if k != "tasks"}
        self._commit = commit
        self._runs: list[dict[str, Any]] = []
        if path.exists():
            with translate_os_errors(path):
                content = read_json(path)
            if content["settings"] != self._settings:
                raise WorkdirError(
                    f"{path} keeps runs of other settings; remove it to begin anew, or "
                    f"continue with {content['settings']}."
                )
            self._runs = content["runs"]

    def find(
        self, task: tasks.Task, precision: str, seed: int
    ) -> dict[str, Any] | None:
        """Returns the run if it has ended, on the same data."""
        key = _key(task, precision, seed)
        same = (run["run"] for run in self._runs if key == {k: run[k] for k in key})
        return next(same, None)

    def add(
        self, task: tasks.Task, precision: str, seed: int, run: dict[str, Any]
    ) -> None:
        """Keeps a run."""
        key = _key(task, precision, seed)
        self._runs.append({**key, "commit": self._commit, "run": run})
        with translate_os_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"settings": self._settings, "runs": self._runs})

    def commits(self) -> list[str]:
        """Returns the commits at which the runs were made."""
        return sorted({str(run["commit"]) for run in self._runs})

    def remove(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)


def _key(task: tasks.Task, precision: str, seed: int) -> dict[str, Any]:
    names = {"task": task.title, "precision": precision, "seed": seed}
    return {**names, "data": dict(task.facts)}


def train_task(
    task: tasks.Task, num_seeds: int, num_evals: int, kept: KeptRuns
) -> dict[str, list[dict[str, Any]]]:
    """Returns the runs of each precision, by seed; trains what is not kept.

    Args:
      task: what to train.
      num_seeds: runs per precision; their seeds are 0, 1, …
      num_evals: how often a run is tested, the last time at its end.
      kept: the runs that have ended, to which it adds.
    """
    inits = {name: jax.jit(v.init) for name, v in task.variants.items()}
    steps = {name: _make_step(task, variant) for name, variant in task.variants.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
    pairs = list(itertools.product(range(num_seeds), steps))
    with tqdm(total=len(pairs) * task.num_steps, desc=task.title, disable=None) as bar:
        for seed, name in pairs:
            if run := kept.find(task, name, seed):
                runs[name].append(run)
                bar.update(task.num_steps)
                continue
            bar.set_postfix_str(f"{name}, seed {seed}")
            init_key, key = jax.random.split(jax.random.key(seed))
            step, tx = steps[name]
            variant = task.variants[name]
            init = variant.init_model_state
            state = mpjax.TrainState.create(
                params=inits[name](init_key),
                tx=tx,
                model_state=None if init is None else init(init_key),
                key=key,
            )
            batches = itertools.islice(task.make_batches(seed), task.num_steps)
            test_steps = _test_steps(task.num_steps, num_evals)
            run = _train(step, state, batches, variant.evaluate, test_steps, bar)
            runs[name].append(run)
            kept.add(task, name, seed, run)
    return runs


def _make_step(task: tasks.Task, variant: tasks.Variant) -> Any:
    """Returns the train step, in which no loss is scaled, and its optimizer."""
    tx = mpjax.with_loss_scale(task.tx, mpjax.NoOpLossScale())
    step = mpjax.make_train_step(
        variant.loss_fn,
        tx,
        policy=variant.policy,
        autocast=variant.autocast,
        **task.step_options,
    )
    return step, tx


def _test_steps(num_steps: int, num_evals: int) -> list[int]:
    return np.unique(np.linspace(0, num_steps, num_evals + 1, dtype=int))[1:].tolist()


def _train(
    step: Any, state: Any, batches: Any, evaluate: Any, test_steps: list[int], bar: Any
) -> dict[str, Any]:
    """Trains one precision and seed; returns losses, and the steps they are of."""
    losses, tests, metrics = [], [], {}
    for index, batch in enumerate(batches, start=1):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
        jax.block_until_ready(metrics)
        if index in test_steps:
            tests.append(evaluate(state))
        bar.update()
    train_losses = np.array(jax.device_get(losses), float)
    pieces = np.array_split(np.arange(1, len(losses) + 1), NUM_POINTS)
    pieces = [piece for piece in pieces if len(piece)]
    return {
        "train_steps": [float(piece.mean()) for piece in pieces],
        "train_losses": [float(train_losses[piece - 1].mean()) for piece in pieces],
        "test_steps": test_steps,
        "tests": tests,
        "num_skipped": int(metrics["num_skipped"]),
    }


def _aggregate(
    name: str, runs: list[dict[str, Any]], references: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the row of a precision, from its runs and float32's, by seed."""
    row: dict[str, Any] = {
        "precision": name,
        "num_skipped": sum(run["num_skipped"] for run in runs),
        "train_steps": runs[0]["train_steps"],
        "train_losses": [run["train_losses"] for run in runs],
        "test_steps": runs[0]["test_steps"],
    }
    for metric, plural in (("loss", "losses"), ("accuracy", "accuracies")):
        if metric not in runs[0]["tests"][-1]:
            continue
        curves, expected = (
            np.array([[test[metric] for test in run["tests"]] for run in group])
            for group in (runs, references)
        )
        row[f"test_{plural}"] = curves.tolist()
        row[f"test_{metric}"] = mean_and_deviation(curves[:, -1].tolist())
        if name != "float32":
            differences = (curves - expected)[:, -1].tolist()
            row[f"{metric}_difference"] = mean_interval(differences)
    return row
