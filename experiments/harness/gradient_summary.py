"""All activation gradients of a run together, as figure 3 of the paper shows them.

"Mixed Precision Training", arXiv:1710.03740, section 3.2. The numbers are those of the
unscaled loss. Where a run counted the gradients of float32, the shares tell what
float16 would lose of them; they go by exponents, so that a number of exactly 2^-25
counts as one that rounds up.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.harness.numerics_summary import (
    EXPONENTS,
    num_values_of,
    scale_exponent,
    shifted,
)
from experiments.harness.results import Column
from mpjax.numerics import (
    ExponentHistogram,
    LossScaleAdvice,
    recommend_loss_scale,
    representable_fraction,
)

HALF = "float16"
PAPER_SCALE = 8  # which was enough in the paper
SCALES = (1, PAPER_SCALE, 128, 1024)
PAPER_ZERO = 0.67  # share of all values, from figure 3's caption
# First and last exponent, and the share of all values, from the same.
PAPER_SHARES = ((-34, -33, 0.02), (-24, -24, 0.02))
_NUM_CLASSES, _ANY_FRACTION = 6, 1  # of `ExponentHistogram`
COLUMNS = (
    Column("loss scale", "loss_scale", "{:,.10g}"),
    Column("", "which"),
    Column("zero in float32", "zero_in_float32", "{:.2%}"),
    Column("zero in float16", "zero", "{:.2%}"),
    Column("nonzero, flushed to zero", "lost", "{:.3%}"),
    Column("recovered of those", "recovered", "{:.1%}"),
    Column("subnormal", "subnormal", "{:.3%}"),
    Column("overflow", "overflow", "{:.3%}"),
)


def count_gradients(
    rows: Sequence[dict[str, Any]],
) -> dict[int, ExponentHistogram]:
    """Returns the histogram of all activation gradients by step, unscaled.

    Args:
      rows: a run's rows of metrics; those of kind "numerics" hold the histograms.
    """
    scales = {r["step"]: r["loss_scale"] for r in rows if r["kind"] == "train"}
    counted = [row for row in rows if row["kind"] == "numerics"]
    return {row["step"]: _pool(row, scales) for row in counted}


def pool(histograms: Sequence[ExponentHistogram]) -> ExponentHistogram:
    """Returns the histogram of the numbers of all; there must be one at least."""
    first, *rest = histograms
    return sum(rest, start=first)


def summarize_gradients(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what float16 loses of the gradients of a run, and at which loss scales.

    Args:
      rows: a run's rows of metrics, some of kind "numerics".

    Returns:
      `runs`, a row per loss scale with the keys of `COLUMNS`; `zero`, the share of
      zeros; `exponents`, exponent → share of all values; `below`, the share of all
      values that are nonzero and below 2^-24, and `between`, of those in
      [2^-27, 2^-24); `advised_scale` and `advice`; `over_steps`, a row per step with
      `zero`, and `lost` at each scale of `runs`.
    """
    by_step = count_gradients(rows)
    total = pool([*by_step.values()])
    num = max(int(total.num_values), 1)
    counts = np.asarray(total.counts)
    advice = recommend_loss_scale(total, HALF)
    table = _scales_table(total, advice)
    is_small = EXPONENTS < -24
    below = int(counts[is_small].sum()) + int(total.below)
    return {
        "runs": table,
        "zero": int(total.zeros) / num,
        "exponents": {
            str(exponent): int(count) / num
            for exponent, count in zip(EXPONENTS.tolist(), counts, strict=True)
            if count
        },
        "below": below / num,
        "between": int(counts[is_small & (EXPONENTS >= -27)].sum()) / num,
        "advised_scale": advice.loss_scale,
        "advice": advice.reason,
        "over_steps": [
            {
                "step": step,
                "zero": int(found.zeros) / max(int(found.num_values), 1),
                "lost": [float(_lost(found, row["loss_scale"])) for row in table],
            }
            for step, found in by_step.items()
        ],
    }


def zero_share(rows: Sequence[dict[str, Any]]) -> float | None:
    """Returns the share of a run's activation gradients that are zero, as computed.

    In float16 that is those that flushed to zero, too. None if nothing was counted.
    """
    by_step = count_gradients(rows)
    if not by_step:
        return None
    total = pool([*by_step.values()])
    return int(total.zeros) / max(int(total.num_values), 1)


def lost_share(
    rows: Sequence[dict[str, Any]], scales: dict[int, float]
) -> float | None:
    """Returns the share of nonzero gradients that float16 flushes to zero.

    Args:
      rows: of a run in float32.
      scales: step → the loss scale to apply, such as that of another run; steps that
        are not there are left out.

    Returns:
      The mean over steps; None if nothing was counted.
    """
    by_step = count_gradients(rows)
    shares = [_lost(x, scales[step]) for step, x in by_step.items() if step in scales]
    return float(np.mean(shares)) if shares else None


def _scales_table(
    total: ExponentHistogram, advice: LossScaleAdvice
) -> list[dict[str, Any]]:
    zero = int(total.zeros) / max(int(total.num_values), 1)
    unscaled = _lost(total, 1)
    rows = []
    for scale in sorted({*map(float, SCALES), advice.loss_scale}):
        kept = representable_fraction(total, HALF, scale)
        is_advised = scale == advice.loss_scale
        names = ["advised"] * is_advised + ["the paper's"] * (scale == PAPER_SCALE)
        recovered = (unscaled - kept.zero) / unscaled if unscaled else None
        rows.append(
            {
                "loss_scale": scale,
                "which": ", ".join(names) or "-",
                "zero_in_float32": zero,
                "zero": float(zero + (1 - zero) * kept.zero),
                "lost": float(kept.zero),
                "recovered": None if recovered is None else float(recovered),
                "subnormal": float(kept.subnormal),
                "overflow": float(kept.overflow),
            }
        )
    return rows


def _lost(histogram: ExponentHistogram, scale: float) -> float:
    return float(representable_fraction(histogram, HALF, scale).zero)


def _pool(row: dict[str, Any], scales: dict[int, float]) -> ExponentHistogram:
    """Returns the histogram of all cotangents of one step, unscaled."""
    found = [kinds.get("cotangents") for kinds in row["operations"].values()]
    present = [histogram for histogram in found if histogram]
    shift = -scale_exponent(row, scales)
    counts = np.zeros(EXPONENTS.size)
    for histogram in present:
        counts += shifted(histogram["counts"], shift)
    class_counts = np.zeros((EXPONENTS.size, _NUM_CLASSES), np.int64)
    class_counts[:, _ANY_FRACTION] = counts
    names = ("zeros", "below", "above", "infs", "nans")
    totals = {name: np.int64(sum(h[name] for h in present)) for name in names}
    # What is shifted out of the range counts as below or above it.
    missing = sum(map(num_values_of, present)) - int(
        counts.sum() + sum(totals.values())
    )
    totals["below" if shift < 0 else "above"] += np.int64(missing)
    lo, hi = int(EXPONENTS[0]), int(EXPONENTS[-1])
    return ExponentHistogram(class_counts, **totals, lo=lo, hi=hi)
