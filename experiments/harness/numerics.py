"""Histograms of exponents during training, and how they are recorded."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mpjax.numerics import ExponentHistogram, OpHistograms, probe

# Range of exponents: unscaled gradients at the low end, scaled ones at the high end.
LO, HI = -80, 40
HISTOGRAMS = "histograms"


def counting(train_step: Callable[..., Any], interval: int) -> Any:
    """Returns a train step that counts exponents in every `interval`-th step.

    Args:
      train_step: made from a loss function wrapped in `mpjax.numerics.tap`.
      interval: steps from one count to the next.

    Returns:
      A jitted `(state, batch) -> (state, metrics)` whose metrics have the histograms
      of every operation under `"histograms"`, all 0 between counts.
    """
    probed = probe(train_step, lo=LO, hi=HI)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        is_counted = state.step % interval == 0
        (state, metrics), histograms = probed.when(is_counted, state, batch)
        return state, {**metrics, HISTOGRAMS: histograms}

    return step


def to_row(histograms: dict[str, OpHistograms]) -> dict[str, Any] | None:
    """Returns histograms as plain values, ready for JSON; None if nothing is counted.

    Returns:
      Name of the operation → "values" and "cotangents" → `counts` of exponents `LO` to
      `HI`, and the numbers of `zeros`, `below`, `above`, `infs` and `nans`.
    """
    row = {
        name: {
            slot: _plain(histogram)
            for slot in ("values", "cotangents")
            if (histogram := getattr(found, slot)) is not None
            and int(histogram.num_values)
        }
        for name, found in histograms.items()
    }
    return row if any(row.values()) else None


def _plain(histogram: ExponentHistogram) -> dict[str, Any]:
    names = ("counts", "zeros", "below", "above", "infs", "nans")
    return {name: np.asarray(getattr(histogram, name)).tolist() for name in names}
