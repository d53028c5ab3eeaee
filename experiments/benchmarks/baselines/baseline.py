"""What a row of the benchmark is."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from experiments.benchmarks.workloads import Work

FLOAT32 = "by hand, float32"


@dataclasses.dataclass(frozen=True)
class Case:
    """What every row starts from.

    Attributes:
      work: the model.
      params: float32 initial values; a row copies what it changes.
      batch: on the device.
    """

    work: Work
    params: Any
    batch: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step, ready to be timed.

    Attributes:
      run: takes so many steps (one by default), waits for the last, and returns the
        loss before that. Python goes on meanwhile, as it does in a training loop.
      temporary_bytes: of the compiled step; None where the library does not say.
    """

    run: Callable[..., float]
    temporary_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to take the step.

    Attributes:
      name: in the table.
      build: `case -> step`.
      reference: the row that its time is divided by.
      works: the models that it can train; None for all.
      needs: the module that must be installed, and how.
      platform: "gpu" for what is of no use elsewhere; None for all.
    """

    name: str
    build: Callable[[Case], Step]
    reference: str
    works: tuple[str, ...] | None = None
    needs: tuple[str, str] | None = None
    platform: str | None = None

    def is_installed(self) -> bool:
        """Whether the library that it needs is here."""
        return self.needs is None or importlib.util.find_spec(self.needs[0]) is not None


def jax_step(
    step: Any,
    state: Any,
    batch: Any,
    loss: Callable[[Any], Any],
    compiler_options: dict[str, Any] | None = None,
) -> Step:
    """Compiles `step(state, batch) -> (state, out)`, which is given the state to keep.

    Args:
      step: jitted, with its first argument donated.
      state: its memory is given away.
      batch: its second argument.
      loss: what of `out` is the loss.
      compiler_options: XLA's, beside its defaults.
    """
    compiled = step.lower(state, batch).compile(compiler_options)

    def run(num_steps: int = 1) -> float:
        nonlocal state
        out = None
        for _ in range(num_steps):
            state, out = compiled(state, batch)
        jax.block_until_ready((state, out))
        return float(loss(out))

    return Step(run, compiled.memory_analysis().temp_size_in_bytes)


def copied(tree: Any) -> Any:
    """Returns arrays with memory of their own, so that a step may take it."""
    return jax.tree.map(lambda x: x.copy(), tree)
