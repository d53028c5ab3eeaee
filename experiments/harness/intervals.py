"""Means over few runs, with what few runs leave uncertain."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean, and Student's 95 % interval of it, which needs two values.

    Args:
      values: one per seed; differences, where two runs of a seed are compared.

    Returns:
      The mean, the lower and the upper end; both ends are NaN for one value.

    >>> [round(x, 2) for x in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def ratio_interval(
    values: Sequence[float], references: Sequence[float]
) -> tuple[float, float, float]:
    """Returns the geometric mean of paired ratios, and its 95 % interval.

    Args:
      values: one per seed, positive.
      references: as many, of the same seeds.

    >>> [round(x, 2) for x in ratio_interval([2.0, 8.0], [1.0, 1.0])][0]
    4.0
    """
    pairs = zip(values, references, strict=True)
    mean, low, high = mean_interval([math.log(a / b) for a, b in pairs])
    return math.exp(mean), math.exp(low), math.exp(high)


def compare_by_seed(
    values: Mapping[int, float | None], baseline: Mapping[int, float | None]
) -> dict[str, Any]:
    """Returns the differences of rates to those of a baseline, over the seeds of both.

    Args:
      values: by seed; None for a run without a value.
      baseline: likewise.

    Returns:
      `difference`, the mean in points with its 95 % interval, as text;
      `difference_interval`, the same as numbers; and `relative`, the change of the mean
      value. All None without a seed of both.
    """
    pairs = [
        (value, other)
        for seed, value in values.items()
        if value is not None and (other := baseline.get(seed)) is not None
    ]
    if not pairs:
        return {"difference": None, "difference_interval": None, "relative": None}
    interval = mean_interval([100 * (value - other) for value, other in pairs])
    ours, theirs = map(sum, zip(*pairs, strict=True))
    text = interval_text(interval, "{:+.2f}")
    if math.isnan(interval[1]):
        text = f"{interval[0]:+.2f}"
    return {
        "difference": text,
        "difference_interval": list(interval),
        "relative": ours / theirs - 1 if theirs else None,
    }


def interval_text(interval: Sequence[float], form: str = "{:.2f}") -> str:
    """Returns a mean and its interval as text.

    >>> interval_text((1.0, 0.9, 1.1))
    '1.00 (0.90 to 1.10)'
    """
    mean, low, high = map(form.format, interval)
    return f"{mean} ({low} to {high})"
