"""Rows of the benchmark compiled, their first steps, and whether these are right."""

import dataclasses
import math
import time
import traceback

from tqdm.auto import tqdm

from experiments.benchmarks.baselines.baseline import FLOAT32, Case, Row, Step

NUM_CHECKED = 3
TOLERANCE = 0.02  # of the loss, relative
CHANGE_TOLERANCE = 0.5  # of what the steps take off it, relative
# Of what float32 by hand takes to compile and for its first step, and seconds: beyond
# both a row is not waited for.
MAX_TIMES_FLOAT32 = 20
MAX_FIRST_S = 20.0


@dataclasses.dataclass(frozen=True)
class Started:
    """A row that is compiled and has taken its first steps.

    Attributes:
      step: what is timed.
      losses: before the first step, and before the last of NUM_CHECKED.
      first_s: seconds that compiling and one step took.
    """

    step: Step
    losses: tuple[float, float]
    first_s: float


def start_all(
    rows: list[Row],
    case: Case,
    *,
    is_patient: bool = True,
    max_minutes: float | None = None,
) -> tuple[dict[str, Started], dict[str, str]]:
    """Compiles and takes the first steps.

    Args:
      rows: float32 by hand first.
      case: what they start from.
      is_patient: False to leave out rows that are slow beyond measure.
      max_minutes: after which no further row is begun.

    Returns:
      The rows by name; and why others are left out: one that runs out of memory is not
      to cost the rest their figures.

    Raises:
      Exception: whatever float32 by hand does, with which all are compared.
    """
    started: dict[str, Started] = {}
    left_out: dict[str, str] = {}
    limit_s = math.inf
    end_s = time.monotonic() + 60 * (max_minutes or math.inf)
    for row in tqdm(rows, "compiling", disable=None):
        if started and time.monotonic() > end_s:
            left_out[row.name] = f"{max_minutes:g} minutes had gone by"
            continue
        try:
            started[row.name] = begun = start(row, case, limit_s)
        except Exception as error:
            if row.name == FLOAT32:
                raise
            left_out[row.name] = _why(error)
            continue
        tqdm.write(f"{row.name}: compiled, and one step, in {begun.first_s:.1f} s")
        if row.name == FLOAT32 and not is_patient:
            limit_s = max(MAX_FIRST_S, MAX_TIMES_FLOAT32 * begun.first_s)
    return started, left_out


class _TooSlow(Exception):
    pass


def _why(error: Exception) -> str:
    if isinstance(error, _TooSlow):
        return str(error)
    traceback.print_exception(error)
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def start(row: Row, case: Case, limit_s: float = math.inf) -> Started:
    """Compiles one row and takes its first steps.

    Args:
      row: what to compile.
      case: what it starts from.
      limit_s: seconds that compiling and one step may take.

    Raises:
      Exception: if that fails, or took longer.
    """
    begin_s = time.perf_counter()
    step = row.build(case)
    first = step.run(1)
    first_s = time.perf_counter() - begin_s
    if first_s > limit_s:
        raise _TooSlow(
            f"its first step took {first_s:.0f} s with compiling, over {limit_s:.0f}; "
            "ask for it by --rows"
        )
    return Started(step, (first, step.run(NUM_CHECKED - 1)), first_s)


def is_right(losses: tuple[float, float], expected: tuple[float, float]) -> bool:
    """Whether a row's loss ends where that of float32 does, and has come as far.

    Args:
      losses: before the first step, and after.
      expected: those of float32 by hand.
    """
    (before, after), (true_before, true_after) = losses, expected
    change, true_change = after - before, true_after - true_before
    is_near = abs(after - true_after) <= TOLERANCE * abs(true_after)
    has_come_as_far = abs(change - true_change) <= CHANGE_TOLERANCE * abs(true_change)
    return bool(is_near and has_come_as_far)
