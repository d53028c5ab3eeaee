"""Training in one policy, from an experiment's declarations to its result."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import mpjax
from experiments.harness import loop, numerics
from experiments.harness.config import BaseConfig, Variant
from experiments.harness.devices import Devices, make_devices
from experiments.harness.experiment import Experiment, Task, evaluate
from experiments.harness.processes import check_same
from experiments.harness.recorder import read_rows
from experiments.harness.results import median
from mpjax.numerics import tap


def train_policy(
    experiment: Experiment, task: Task, config: BaseConfig, policy: str, directory: Path
) -> tuple[dict[str, Any], mpjax.TrainState]:
    """Trains and tests in one policy, or continues where a run was stopped.

    Args:
      experiment: what to measure.
      task: what to train.
      config: the settings; its `workdir` is set.
      policy: the name of the precision policy.
      directory: where metrics and checkpoints go.

    Returns:
      The run as plain values (its settings, the metrics of the test set and of the last
      epoch, times, skipped steps), and the final state; with --mesh on one device of
      this process, without the optimizer's state.

    Raises:
      Interrupted: after a signal, once the state is saved.
      NonFiniteTrainingError: if the gradients stay non-finite.
      ExperimentError: for data, checkpoints or files that fail.
    """
    devices = make_devices(config)
    check_same({"num_steps": task.num_steps})
    task = dataclasses.replace(task, batches=devices.own_part(task.batches))
    loss_scale = config.make_loss_scale(policy)
    tx = mpjax.with_loss_scale(task.tx, loss_scale)
    state = devices.put_state(task.make_state(tx, policy, config.seed))
    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    print(
        f"{policy}, loss scale {config.loss_scale_name(policy)}: {num_parameters:,} "
        f"parameters, {task.data}, {devices}",
        flush=True,
    )
    train_step = _make_train_step(task, tx, config, policy, devices)
    local_step = train_step
    if devices.mesh is not None:
        local_step = _make_train_step(task, tx, config, policy, Devices())
    run = loop.Run(
        policy, experiment, task, state, train_step, loss_scale, devices, local_step
    )
    trained = loop.train(run, config, directory)
    state = devices.whole_state(trained.state, has_optimizer=False)
    test = evaluate(experiment, task, state, "test")
    _print_test(experiment, policy, test, trained.compile_s)
    epochs = [row for row in trained.rows if row["kind"] == "epoch"]
    last = epochs[-1] if epochs else {}
    scaling = mpjax.loss_scale_state(trained.state.opt_state)
    values = {
        "policy": policy,
        "loss_scale": config.loss_scale_name(policy),
        "seed": config.seed,
        **task.facts,
        "num_parameters": num_parameters,
        "num_steps": task.num_steps,
        **test,
        **{f"val_{n}": last.get(f"val_{n}") for n in experiment.metric_names()},
        "ms_per_step": median([row["ms_per_step"] for row in epochs]),
        "compile_s": trained.compile_s,
        "num_skipped": int(scaling.num_skipped),
        "final_loss_scale": float(scaling.loss_scale.loss_scale),
    }
    return values, state


def train_variant(
    train: Callable[[], dict[str, Any]], name: str, variant: Variant, directory: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains one run of a comparison, in which to diverge is a result.

    Args:
      train: trains, and returns the run as plain values.
      name: the run's name, to print.
      variant: the way to train.
      directory: where `train` leaves the metrics.

    Returns:
      The run with its `policy`, `loss_scale`, `num_skipped`, and `diverged`: None, or
      why the training ended early. Then the rows of its metrics.

    Raises:
      Interrupted: after a signal, once the state is saved.
      ExperimentError: for data, checkpoints or files that fail.
    """
    print(f"{name}:", flush=True)
    diverged, run = None, {}
    try:
        run = train()
    except mpjax.NonFiniteTrainingError as error:
        diverged = str(error)
        print(f"{name} diverged: {error}", flush=True)
    rows = read_rows(directory / "metrics.jsonl")
    skipped = [row["num_skipped"] for row in rows if row["kind"] == "train"]
    own = {"diverged": diverged, "num_skipped": max(skipped, default=0)}
    return {**run, **variant._asdict(), **own}, rows


def _make_train_step(
    task: Task, tx: Any, config: BaseConfig, policy: str, devices: Devices
) -> Any:
    loss_fn, interval = task.loss_fn, task.numerics_interval
    options = {"policy": policy, "autocast": config.autocast, "mesh": devices.mesh}
    options |= task.step_options
    if interval is None:
        return mpjax.make_train_step(loss_fn, tx, **options)
    step = mpjax.make_train_step(tap(loss_fn), tx, **options)
    return numerics.counting(step, interval)


def _print_test(
    experiment: Experiment, policy: str, test: dict[str, float], compile_s: float
) -> None:
    numbers = ", ".join(
        f"{metric.title} {metric.format.format(test[f'test_{metric.name}'])}"
        for metric in experiment.metrics
    )
    print(f"{policy}: test {numbers}; compiled in {compile_s:.1f} s", flush=True)
