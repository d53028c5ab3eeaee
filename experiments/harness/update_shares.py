"""Shares of the updates that float16 takes away, out of what `track_updates` counted.

A run's `observed` are its rows of that kind, one per epoch in order, each with what
`read_tracked` returns: counts since the first step. The last row's `gradients` suffice.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from experiments.harness.update_tracking import histogram_from_json, share_below
from mpjax.numerics import ExponentHistogram

SMALLEST_EXPONENT = -24  # of float16's smallest number


def lost_by_epoch(observed: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Returns, for each parameter, the share of its updates lost in each epoch.

    Args:
      observed: the rows of a run; NaN stands for an epoch without updates.
    """
    names = list(observed[0]["updates"]) if observed else []
    return {
        name: [
            _ratio(lost - lost_before, nonzero - nonzero_before)
            for (lost_before, nonzero_before), (lost, nonzero) in _pairs(observed, name)
        ]
        for name in names
    }


def shares(observed: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the shares over a whole run and all parameters; NaN without updates.

    Returns:
      `lost_updates`, share of the nonzero updates that a float16 weight loses;
      `zeroed_updates`, those of them that are below float16's smallest number;
      `lost_magnitude`, share of the sum of their magnitudes; and `small_gradients`,
      share of the nonzero weight gradients below 2**-24.
    """
    counts = list(observed[-1]["updates"].values()) if observed else []
    total = lambda name: sum(_number(values[name]) for values in counts)
    small = math.nan
    if observed:
        small = share_below(gradient_histogram(observed), SMALLEST_EXPONENT)
    return {
        "lost_updates": _ratio(total("num_lost"), total("num_nonzero")),
        "zeroed_updates": _ratio(total("num_zeroed"), total("num_nonzero")),
        "lost_magnitude": _ratio(total("lost_magnitude"), total("magnitude")),
        "small_gradients": small,
    }


def gradient_histogram(observed: Sequence[dict[str, Any]]) -> ExponentHistogram:
    """Returns the histogram of the weight gradients of all steps of a run."""
    return histogram_from_json(observed[-1]["gradients"])


def _pairs(observed: Sequence[dict[str, Any]], name: str) -> Any:
    """Returns (lost, nonzero) before and after each epoch."""
    counts = [row["updates"][name] for row in observed]
    totals = [(0, 0), *((c["num_lost"], c["num_nonzero"]) for c in counts)]
    return itertools.pairwise(totals)


def _number(value: float | None) -> float:
    """Returns NaN for what a result file holds as null."""
    return math.nan if value is None else value


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
