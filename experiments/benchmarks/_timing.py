"""Interleaved timing, and the numbers that sum it up.

Whatever else a machine does hits all the functions of a round alike, so ratios are
taken within a round: their median is steadier than the ratio of two medians.
"""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from tqdm.auto import tqdm

Name = TypeVar("Name", bound=Hashable)


def time_rounds(
    fns: Mapping[Name, Callable[[], Any]], num_rounds: int, *, seed: int = 0
) -> dict[Name, list[float]]:
    """Times functions by turns; each round calls all once, in a shuffled order.

    Args:
      fns: by name; each waits for what it computes.
      num_rounds: how often each is called.
      seed: seed of the orders.

    Returns:
      The milliseconds of each call by name, a list over rounds.
    """
    times_ms: dict[Name, list[float]] = {name: [] for name in fns}
    order = list(fns)
    shuffle = random.Random(seed).shuffle
    for _ in tqdm(range(num_rounds), desc="rounds", disable=None, leave=None):
        shuffle(order)
        for name in order:
            times_ms[name].append(1000 * seconds(fns[name]))
    return times_ms


def seconds(fn: Callable[[], Any]) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def median_ratio(times: list[float], reference: list[float]) -> float:
    """Returns the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))
