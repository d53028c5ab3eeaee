"""Compiles the baselines, takes their first steps, and checks what these computed."""

import dataclasses
import math
import time
import traceback

from tqdm.auto import tqdm

from experiments.benchmarks.baselines.baseline import FLOAT32, Baseline, Case, Step

NUM_CHECKED = 3
TOLERANCE = 0.02  # of the loss, relative
CHANGE_TOLERANCE = 0.5  # of what the steps take off the loss, relative
# With a time limit, compiling and the first step may take this many seconds, or this
# many times what they take in float32 by hand, whichever is longer.
MAX_FIRST_S = 20.0
MAX_TIMES_FLOAT32 = 20


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A baseline that is compiled and has taken its first steps.

    Attributes:
      step: the step to time.
      losses: before the first step, and before the last of NUM_CHECKED.
      first_s: seconds that compiling and one step took.
    """

    step: Step
    losses: tuple[float, float]
    first_s: float


def warm_up_all(
    baselines: list[Baseline],
    case: Case,
    *,
    time_limit: bool = False,
    max_minutes: float | None = None,
) -> tuple[dict[str, Compiled], dict[str, str]]:
    """Compiles baselines and takes their first steps.

    One that fails, by running out of memory for instance, does not cost the others
    their figures.

    Args:
      baselines: float32 by hand first.
      case: what they start from.
      time_limit: whether to leave out those that take far longer than float32 by hand.
      max_minutes: minutes after which no further baseline is begun.

    Returns:
      The compiled baselines by name, and why the others are left out, by name.

    Raises:
      Exception: whatever float32 by hand raises: all are compared with it.
    """
    compiled: dict[str, Compiled] = {}
    left_out: dict[str, str] = {}
    limit_s = math.inf
    end_s = time.monotonic() + 60 * (max_minutes or math.inf)
    for baseline in tqdm(baselines, "compiling", disable=None):
        name = baseline.name
        if compiled and time.monotonic() > end_s:
            left_out[name] = f"{max_minutes:g} minutes had gone by"
            continue
        try:
            compiled[name] = warm_up(baseline, case, limit_s)
        except Exception as error:
            if name == FLOAT32:
                raise
            left_out[name] = _reason(error)
            continue
        first_s = compiled[name].first_s
        tqdm.write(f"{name}: compiled, and one step, in {first_s:.1f} s")
        if name == FLOAT32 and time_limit:
            limit_s = max(MAX_FIRST_S, MAX_TIMES_FLOAT32 * first_s)
    return compiled, left_out


def warm_up(baseline: Baseline, case: Case, limit_s: float = math.inf) -> Compiled:
    """Compiles one baseline and takes its first steps.

    Args:
      baseline: what to compile.
      case: what it starts from.
      limit_s: seconds that compiling and one step may take.

    Raises:
      Exception: if that fails, or took longer.
    """
    start_s = time.perf_counter()
    step = baseline.build(case)
    first_loss = step.run(1)
    first_s = time.perf_counter() - start_s
    if first_s > limit_s:
        raise _TooSlow(
            f"its first step took {first_s:.0f} s with compiling, over {limit_s:.0f}; "
            "ask for it by --baselines"
        )
    return Compiled(step, (first_loss, step.run(NUM_CHECKED - 1)), first_s)


def matches_reference(
    losses: tuple[float, float], reference: tuple[float, float]
) -> bool:
    """Returns whether a loss ends where the reference's does, and has come as far.

    Args:
      losses: before the first step, and before the last.
      reference: the same of float32 by hand.
    """
    (before, after), (true_before, true_after) = losses, reference
    change, true_change = after - before, true_after - true_before
    is_near = abs(after - true_after) <= TOLERANCE * abs(true_after)
    has_come_as_far = abs(change - true_change) <= CHANGE_TOLERANCE * abs(true_change)
    return bool(is_near and has_come_as_far)


class _TooSlow(Exception):
    pass


def _reason(error: Exception) -> str:
    if isinstance(error, _TooSlow):
        return str(error)
    traceback.print_exception(error)
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
