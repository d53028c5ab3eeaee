"""The training loop; it waits for the device only to stay a few steps ahead of it."""

import collections
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from tqdm.auto import tqdm

import mpjax
from experiments.harness import numerics
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.config import BaseConfig
from experiments.harness.devices import Devices
from experiments.harness.errors import DataError, first_line
from experiments.harness.experiment import Experiment, Task, evaluate
from experiments.harness.processes import Poll, is_first
from experiments.harness.recorder import Recorder, weighted_mean
from experiments.harness.stop import Interrupted, StopRequest, on_signals
from experiments.harness.workdir import CHECKPOINTS
from mpjax.numerics import NonFinite, find_nonfinite

MAX_STEPS_IN_FLIGHT = 2  # steps that the host may be ahead of the device
REFRESH_S = 0.25  # seconds between two updates of the progress bar


@dataclasses.dataclass(frozen=True)
class Run:
    """One task, made ready to train in one policy.

    Attributes:
      name: shown by the progress bar.
      experiment: what to measure.
      task: the data, and how to evaluate.
      state: the initial `TrainState`, on the devices.
      train_step: as `mpjax.make_train_step` returns it.
      loss_scale: as given to `with_loss_scale`.
      devices: where state and batches are.
      local_step: the same step for one device, to look for an Inf or NaN.
    """

    name: str
    experiment: Experiment
    task: Task
    state: mpjax.TrainState
    train_step: Any
    loss_scale: Any
    devices: Devices
    local_step: Any


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the loop returns.

    Attributes:
      state: the final `TrainState`.
      rows: all rows of metrics; see `Recorder`.
      compile_s: seconds to trace and compile the train step.
    """

    state: mpjax.TrainState
    rows: list[dict[str, Any]]
    compile_s: float


def train(run: Run, config: BaseConfig, directory: Path) -> Trained:
    """Trains from the start, or from the newest checkpoint, to the end.

    Raises:
      Interrupted: after a signal, once the state is saved.
      NonFiniteTrainingError: if loss scaling cannot help; the last good checkpoint is
        kept.
      CheckpointError: if no checkpoint can be restored.
      DataError: if the data end before the training.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(directory / CHECKPOINTS, keep=config.num_checkpoints)
    try:
        step, state = 0, run.state
        if checkpoint := checkpoints.restore(run.state):
            step, state, data_state = checkpoint
            run.task.batches.set_state(data_state)
        if config.resume:
            print(_resume_line(run, step), flush=True)
        recorder = Recorder(directory, first_step=step)
        try:
            with on_signals() as stop:
                loop = _Loop(run, config, checkpoints, recorder, stop)
                return loop.run_from(step, state)
        finally:
            recorder.close()
    finally:
        checkpoints.close()


def epoch_line(experiment: Experiment, row: dict[str, Any], num_epochs: int) -> str:
    """Returns an epoch's row of metrics as a line of text."""
    formats = {"loss": "{:.4f}"} | {m.name: m.format for m in experiment.metrics}
    numbers = [
        f"{split}{name} {format_.format(row[split + name])}"
        for split in ("", "val_")
        for name, format_ in formats.items()
        if split + name in row
    ]
    return "  ".join(
        (
            f"epoch {row['epoch']:{len(str(num_epochs))}d}/{num_epochs}",
            f"{row['ms_per_step']:7.1f} ms/step",
            *numbers,
            f"scale {row['loss_scale']:g}",
            f"skipped {row['num_skipped']}",
        )
    )


def _resume_line(run: Run, step: int) -> str:
    if not step:
        return f"{run.name}: no checkpoint yet, from the first step"
    num_steps = run.task.num_steps
    if step >= num_steps:
        return f"{run.name}: all {num_steps} steps were taken before"
    return f"{run.name}: resumed after step {step} of {num_steps}"


class _Loop:
    def __init__(
        self,
        run: Run,
        config: BaseConfig,
        checkpoints: Checkpoints,
        recorder: Recorder,
        stop: StopRequest,
    ):
        self.run, self.task = run, run.task
        self.config = config
        self.checkpoints = checkpoints
        self.recorder = recorder
        self.stop = stop
        # Steps that the device may not have done yet: their numbers and metrics.
        self.pending: collections.deque[tuple[int, Any]] = collections.deque()
        self.newest: tuple[Any, Any] | None = None  # state and batch of the last step
        self.poll = Poll()
        limit = config.max_consecutive_skipped
        self.guard = mpjax.NonFiniteGuard(run.loss_scale, max_consecutive_skipped=limit)
        for row in recorder.select("train")[-limit:]:
            self.guard.check(row)

    def run_from(self, first_step: int, state: mpjax.TrainState) -> Trained:
        """Compiles the step and runs it until `num_steps` are done."""
        if first_step >= self.task.num_steps:
            return Trained(state, self.recorder.rows, 0.0)
        batches = map(self.run.devices.put_batch, self.task.batches)
        batch = next(batches, None)
        if batch is None:
            raise self._data_ended(first_step)
        train_step = _CompiledSteps(self.run.train_step)
        train_step.compile(state, batch)
        jax.block_until_ready((state, batch))
        batches = itertools.chain([batch], batches)
        with _progress_bar(self.run, first_step) as bar:
            state = self._steps(train_step, first_step, state, batches, bar)
        return Trained(state, self.recorder.rows, train_step.compile_s)

    def _steps(
        self,
        train_step: "_CompiledSteps",
        step: int,
        state: mpjax.TrainState,
        batches: Iterator[Any],
        bar: "_ProgressBar",
    ) -> mpjax.TrainState:
        """Runs to the last step; returns the final state."""
        task = self.task
        epoch_start, epoch_first = train_step.clock_s(), step
        for batch in batches:
            state, metrics = train_step.compile(state, batch)(state, batch)
            step += 1
            self.pending.append((step, metrics))
            self.newest = state, batch
            self._wait(bar)
            last = step == task.num_steps
            signal_number = self.poll.largest(
                self.stop.signal_number or 0, (state, metrics)
            )
            if step % task.steps_per_epoch == 0 or last:
                jax.block_until_ready(state)
                elapsed_s = train_step.clock_s() - epoch_start
                self._drain(bar, keep=0)
                ms = 1000 * elapsed_s / (step - epoch_first)
                self._end_epoch(step, state, ms)
                epoch_start, epoch_first = train_step.clock_s(), step
            if last:
                return state
            if signal_number:
                self._interrupt(bar, step, state, signal_number)
        raise self._data_ended(step)

    def _data_ended(self, step: int) -> DataError:
        return DataError(
            f"the training data ended after {step} of {self.task.num_steps} steps; "
            "repeat them, or train for fewer steps."
        )

    def _wait(self, bar) -> None:
        """Lets the host run ahead of the device by a few steps and no more."""
        if len(self.pending) > MAX_STEPS_IN_FLIGHT:
            jax.block_until_ready(self.pending[-1 - MAX_STEPS_IN_FLIGHT][1])
        # Several processes must find an Inf or NaN at the same step.
        is_due = time.perf_counter() - bar.last_drain_s > REFRESH_S
        if is_due or self.poll.has_several:
            self._drain(bar, keep=MAX_STEPS_IN_FLIGHT)

    def _drain(self, bar, *, keep: int) -> None:
        """Records the metrics of all steps but the last `keep`."""
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
        assert self.newest is not None
        tqdm.write("looking for the first Inf or NaN ...", file=sys.stdout)
        try:
            whole = self.run.devices.whole(self.newest)
            return find_nonfinite(self.run.local_step)(*whole)
        except jax.errors.JaxRuntimeError as error:  # as where the memory is too small
            tqdm.write(f"it was not found: {first_line(error)}", file=sys.stdout)
            return None

    def _end_epoch(self, step: int, state: mpjax.TrainState, ms_per_step: float):
        """Evaluates, records and prints the epoch, and saves a checkpoint."""
        size = self.task.steps_per_epoch
        epoch = -(-step // size)
        rows = self.recorder.select("train", after=(epoch - 1) * size)
        averaged = {"loss", "grad_norm", *self.run.experiment.metric_names()}
        row = {n: weighted_mean(rows, n) for n in rows[0] if n in averaged}
        observe = self.task.observe
        whole = self.run.devices.whole_state(state, has_optimizer=observe is not None)
        row |= evaluate(self.run.experiment, self.task, whole, "val")
        row |= {"loss_scale": rows[-1]["loss_scale"]}
        row |= {"num_skipped": rows[-1]["num_skipped"], "ms_per_step": ms_per_step}
        row = {"epoch": epoch, **row}
        self.recorder.write("epoch", step, row)
        if observe is not None:
            observed = {"epoch": epoch, **observe(whole)}
            self.recorder.write("observed", step, observed)
        self.recorder.flush()
        self._save(step, state)
        line = epoch_line(self.run.experiment, row, self.task.num_epochs)
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _save(self, step: int, state: mpjax.TrainState) -> None:
        self.checkpoints.save(step, state, self.task.batches.get_state())

    def _interrupt(
        self, bar, step: int, state: mpjax.TrainState, signal_number: int
    ) -> NoReturn:
        jax.block_until_ready(state)
        self._drain(bar, keep=0)
        self.recorder.flush()
        self._save(step, state)
        bar.close()
        kept = f"saved after step {step}"
        if not self.config.num_checkpoints:
            kept = f"nothing was saved after step {step} (--num-checkpoints 0)"
        raise Interrupted(signal_number, kept, self.config.resume_flags())


class _CompiledSteps:
    """A train step, compiled once for each shape of batch; keeps the time apart."""

    def __init__(self, train_step: Any):
        self._train_step = train_step
        self._compiled: dict[Any, Any] = {}
        self.compile_s = 0.0

    def compile(self, state: mpjax.TrainState, batch: Any) -> Any:
        """Returns the train step for batches like this one."""
        leaves, structure = jax.tree.flatten(batch)
        key = structure, tuple((x.shape, x.dtype) for x in leaves)
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = self._train_step.lower(state, batch).compile()
            self.compile_s += time.perf_counter() - start
        return self._compiled[key]

    def clock_s(self) -> float:
        """Returns a time in seconds that stands still while a step is compiled."""
        return time.perf_counter() - self.compile_s


class _ProgressBar(tqdm):
    """A progress bar with a step's metrics; silent if stderr is not a terminal."""

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


def _progress_bar(run: Run, first_step: int) -> _ProgressBar:
    bar = _ProgressBar(
        desc=run.name,
        total=run.task.num_steps,
        initial=first_step,
        unit="step",
        disable=None if is_first() else True,
        leave=False,
        dynamic_ncols=True,
        smoothing=0.1,
    )
    bar.last_drain_s = time.perf_counter()
    return bar
