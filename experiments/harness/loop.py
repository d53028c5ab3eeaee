"""The training loop: nothing in it waits for the device but a bounded queue."""

import collections
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

import mpjax
from experiments.harness import numerics
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.config import BaseConfig
from experiments.harness.recorder import Recorder, weighted_mean
from experiments.harness.stop import StopRequest, on_signals
from mpjax.numerics import NonFinite, find_nonfinite

# Steps the device may be behind the host, and how often the screen shows a new one.
MAX_STEPS_IN_FLIGHT = 2
REFRESH_S = 0.25


@dataclasses.dataclass(frozen=True)
class Task:
    """What an experiment gives the loop.

    Attributes:
      name: of the run, shown by the progress bar.
      state: initial `TrainState`.
      train_step: as `mpjax.make_train_step` returns it.
      batches: `(first_step) -> iterator` of batches on the device; the same batch for
        the same step, whatever the first one was.
      evaluate: `(state) -> metrics`, plain numbers, after every epoch.
      loss_scale: as given to `with_loss_scale`.
      steps_per_epoch: batches in an epoch.
      num_steps: batches in all.
      epoch_line: `(row) -> str`, what an epoch prints; the row has `epoch`, the means
        of the training metrics, those of `evaluate`, and `ms_per_step`.
    """

    name: str
    state: mpjax.TrainState
    train_step: Any
    batches: Callable[[int], Iterator[Any]]
    evaluate: Callable[[mpjax.TrainState], dict[str, float]]
    loss_scale: Any
    steps_per_epoch: int
    num_steps: int
    epoch_line: Callable[[dict[str, Any]], str]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the loop returns.

    Attributes:
      state: final `TrainState`.
      rows: all rows of metrics.
      compile_s: seconds to trace and compile the train step.
    """

    state: mpjax.TrainState
    rows: list[dict[str, Any]]
    compile_s: float


def train(task: Task, config: BaseConfig, directory: Path) -> Trained:
    """Trains to the end, or from the newest checkpoint to the end.

    Raises:
      Interrupted: after a signal, once the state is saved.
      NonFiniteTrainingError: if loss scaling cannot help; the last good checkpoint is
        kept.
      CheckpointError: if every checkpoint is damaged.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(directory / "checkpoints", keep=config.num_checkpoints)
    try:
        step, state = checkpoints.restore(task.state) or (0, task.state)
        recorder = Recorder(directory, first_step=step)
        try:
            with on_signals() as stop:
                loop = _Loop(task, config, checkpoints, recorder, stop)
                return loop.run(step, state)
        finally:
            recorder.close()
    finally:
        checkpoints.close()


class _Loop:
    def __init__(self, task, config, checkpoints, recorder, stop: StopRequest):
        self.task = task
        self.config = config
        self.checkpoints: Checkpoints = checkpoints
        self.recorder: Recorder = recorder
        self.stop = stop
        self.pending: collections.deque[tuple[int, Any]] = collections.deque()
        self.newest: tuple[int, Any] = (0, task.state)
        limit = config.max_consecutive_skipped
        self.guard = mpjax.NonFiniteGuard(
            task.loss_scale, max_consecutive_skipped=limit
        )
        for row in recorder.select("train")[-limit:]:
            self.guard.check(row)

    def run(self, first_step: int, state: mpjax.TrainState) -> Trained:
        if first_step >= self.task.num_steps:
            return Trained(state, self.recorder.rows, 0.0)
        batches = self.task.batches(first_step)
        batch = next(batches)
        start = time.perf_counter()
        compiled = self.task.train_step.lower(state, batch).compile()
        compile_s = time.perf_counter() - start
        jax.block_until_ready((state, batch))
        batches = itertools.chain([batch], batches)
        with _progress_bar(self.task, first_step) as bar:
            state = self._steps(compiled, first_step, state, batches, bar)
        return Trained(state, self.recorder.rows, compile_s)

    def _steps(self, train_step, step: int, state, batches, bar):
        """Runs to the last step; returns the final state."""
        task = self.task
        epoch_start, epoch_first = time.perf_counter(), step
        for batch in batches:
            state, metrics = train_step(state, batch)
            step += 1
            self.pending.append((step, metrics))
            self.newest = step, state
            self._wait(bar)
            last = step == task.num_steps
            if step % task.steps_per_epoch == 0 or last:
                jax.block_until_ready(state)
                elapsed_s = time.perf_counter() - epoch_start
                self._drain(bar, keep=0)
                ms = 1000 * elapsed_s / (step - epoch_first)
                self._end_epoch(step, state, ms)
                epoch_start, epoch_first = time.perf_counter(), step
            if last:
                break
            if self.stop.requested:
                self._interrupt(bar, step, state)
        return state

    def _wait(self, bar) -> None:
        """Lets the host run ahead of the device by a few steps and no more."""
        if len(self.pending) > MAX_STEPS_IN_FLIGHT:
            jax.block_until_ready(self.pending[-1 - MAX_STEPS_IN_FLIGHT][1])
        if time.perf_counter() - bar.last_drain_s > REFRESH_S:
            self._drain(bar, keep=MAX_STEPS_IN_FLIGHT)

    def _drain(self, bar, *, keep: int) -> None:
        """Records the metrics of steps that are done."""
        steps = [self.pending.popleft() for _ in range(len(self.pending) - keep)]
        shown = None
        for step, metrics in jax.device_get(steps):
            operations = numerics.to_row(metrics.pop(numerics.HISTOGRAMS, {}))
            self.recorder.write("train", step, metrics)
            if operations is not None:
                self.recorder.write("numerics", step, {"operations": operations})
            self.guard.check(metrics, self._find_nonfinite)
            shown = step, metrics
        bar.show(shown)

    def _find_nonfinite(self) -> NonFinite | None:
        """Looks for the operation that made the last step's Inf or NaN."""
        step, state = self.newest
        batch = next(self.task.batches(step - 1))
        tqdm.write("looking for the first Inf or NaN ...", file=sys.stdout)
        return find_nonfinite(self.task.train_step)(state, batch)

    def _end_epoch(self, step: int, state: mpjax.TrainState, ms_per_step: float):
        size = self.task.steps_per_epoch
        epoch = -(-step // size)
        rows = self.recorder.select("train", after=(epoch - 1) * size)
        names = [n for n in rows[0] if n in ("loss", "accuracy", "grad_norm")]
        row = {name: weighted_mean(rows, name) for name in names}
        row |= self.task.evaluate(state)
        row |= {"loss_scale": rows[-1]["loss_scale"]}
        row |= {"num_skipped": rows[-1]["num_skipped"], "ms_per_step": ms_per_step}
        self.recorder.write("epoch", step, {"epoch": epoch, **row})
        self.recorder.flush()
        self.checkpoints.save(step, state)
        tqdm.write(self.task.epoch_line({"epoch": epoch, **row}), file=sys.stdout)
        sys.stdout.flush()

    def _interrupt(self, bar, step: int, state: mpjax.TrainState) -> None:
        jax.block_until_ready(state)
        self._drain(bar, keep=0)
        self.recorder.flush()
        self.checkpoints.save(step, state)
        bar.close()
        kept = f"saved after step {step}"
        if not self.config.num_checkpoints:
            kept = f"nothing was saved after step {step} (--num-checkpoints 0)"
        self.stop.check(kept, self.config.resume_flags())


class _ProgressBar(tqdm):
    """tqdm, quiet where stderr is no terminal, that shows what a step measured."""

    last_drain_s = 0.0

    def show(self, shown: tuple[int, dict[str, Any]] | None) -> None:
        self.last_drain_s = time.perf_counter()
        if shown is None:
            return
        step, metrics = shown
        self.set_postfix(
            loss=f"{metrics['loss']:.4f}",
            scale=f"{metrics['loss_scale']:g}",
            skipped=int(metrics["num_skipped"]),
            refresh=False,
        )
        self.update(step - self.n)


def _progress_bar(task: Task, first_step: int) -> _ProgressBar:
    bar = _ProgressBar(
        desc=task.name,
        total=task.num_steps,
        initial=first_step,
        unit="step",
        disable=None,
        leave=False,
        dynamic_ncols=True,
        smoothing=0.1,
    )
    bar.last_drain_s = time.perf_counter()
    return bar
