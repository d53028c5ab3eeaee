"""What a baseline of the speed benchmark is."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from experiments.benchmarks.workloads import Workload

FLOAT32 = "by hand, float32"


@dataclasses.dataclass(frozen=True)
class Case:
    """What every baseline starts from.

    Attributes:
      workload: the model.
      params: float32 initial values; a baseline copies what it changes.
      batch: the examples, on the device.
    """

    workload: Workload
    params: Any
    batch: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step, ready to be timed.

    Attributes:
      run: `run(num_steps=1)` takes steps one after the other without waiting, as
        a training loop does, then waits for the last and returns the loss before it.
      temporary_bytes: memory of the compiled step beside its arguments and outputs;
        None where the library does not say.
      program: returns the text of the compiled step; "" where the library does not say.
    """

    run: Callable[..., float]
    temporary_bytes: int | None = None
    program: Callable[[], str] = lambda: ""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One way to take the training step.

    Attributes:
      name: its name in the table.
      build: `case -> step`; compiles the step.
      reference: name of the baseline that its time is divided by.
      workloads: names of the models that it can train; None for all.
      needs: the module that must be installed, and the command that installs it.
      platform: "gpu" for a baseline of no use elsewhere; None for all.
    """

    name: str
    build: Callable[[Case], Step]
    reference: str
    workloads: tuple[str, ...] | None = None
    needs: tuple[str, str] | None = None
    platform: str | None = None

    def is_installed(self) -> bool:
        """Returns whether the library that it needs is installed."""
        return self.needs is None or importlib.util.find_spec(self.needs[0]) is not None


def jax_step(
    step: Any,
    state: Any,
    batch: Any,
    loss: Callable[[Any], Any],
    compiler_options: dict[str, Any] | None = None,
) -> Step:
    """Compiles `step(state, batch) -> (state, out)`.

    Args:
      step: a jitted function that donates its first argument.
      state: its first argument, whose memory it takes.
      batch: its second argument.
      loss: returns the loss from `out`.
      compiler_options: options of XLA that differ from its defaults.
    """
    compiled = step.lower(state, batch).compile(compiler_options)

    def run(num_steps: int = 1) -> float:
        nonlocal state
        out = None
        for _ in range(num_steps):
            state, out = compiled(state, batch)
        jax.block_until_ready((state, out))
        return float(loss(out))

    temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
    return Step(run, temporary_bytes, lambda: compiled.as_text() or "")


def copy_arrays(tree: Any) -> Any:
    """Returns a copy of every array, whose memory a step may take."""
    return jax.tree.map(lambda x: x.copy(), tree)
