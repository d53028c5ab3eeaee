"""The table of `speech_updates`: optimizers and variants, beside the paper."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.harness.intervals import compare_by_seed
from experiments.harness.results import Column, median
from experiments.harness.update_shares import (
    gradient_histogram,
    lost_by_epoch,
    shares,
)

BASELINE = "float32"
# Relative change of the error rate in the paper: Figure 2a, and its table's Mandarin
# DeepSpeech 2, 15.82 to 15.01.
PAPER_RELATIVE = {"float16_updates": 0.80, "mixed_float16": 15.01 / 15.82 - 1}

COLUMNS = (
    Column("optimizer", "optimizer"),
    Column("weights and arithmetic", "variant"),
    Column("seeds", "num_seeds"),
    Column("diverged", "num_diverged"),
    Column("test CER", "test_cer", "{:.2%}"),
    Column("points to float32 (95 %)", "difference"),
    Column("relative", "relative", "{:+.1%}"),
    Column("paper", "paper_relative", "{:+.0%}"),
    Column("skipped", "num_skipped", "{:.3g}"),
    Column("updates lost", "lost_updates", "{:.1%}"),
    Column("of magnitude", "lost_magnitude", "{:.2%}"),
    Column("gradients below 2^-24", "small_gradients", "{:.3%}"),
)


def summarize(
    runs: Sequence[dict[str, Any]], variants: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Returns a row per optimizer and variant.

    Args:
      runs: the results of single runs, as `speech_updates` makes them; a run that
        diverged has `diverged` and no `test_cer`.
      variants: optimizer and variant of each row.

    Returns:
      Rows with the keys of `COLUMNS`: means over the seeds that did not diverge;
      `difference` in points, paired by seed, with Student's 95 % interval; `relative`,
      the change of the mean error over the same seeds. Beside them `test_cers` and
      `val_errors` by seed, `lost_by_layer` (parameter → mean share lost in each
      epoch), `gradient_exponents` (exponent → share) and `diverged`, by seed.
    """
    by_cell: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for run in runs:
        key = run["optimizer"], run["variant"]
        by_cell.setdefault(key, {})[run["seed"]] = run
    return [_row(by_cell[key], by_cell.get((key[0], BASELINE), {})) for key in variants]


def _row(
    seeds: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    runs = list(seeds.values())
    observed = [run["observed"] for run in runs if run["observed"]]
    errors = {seed: _error(run) for seed, run in seeds.items()}
    others = {seed: _error(run) for seed, run in baseline.items()}
    finished = [error for error in errors.values() if error is not None]
    times = [run["ms_per_step"] for run in runs if run.get("ms_per_step")]
    variant = runs[0]["variant"]
    return {
        "optimizer": runs[0]["optimizer"],
        "variant": variant,
        "policy": runs[0]["policy"],
        "loss_scale": runs[0]["loss_scale"],
        "learning_rate": runs[0]["learning_rate"],
        "num_seeds": len(runs),
        "num_diverged": len(runs) - len(finished),
        "test_cer": statistics.mean(finished) if finished else None,
        **compare_by_seed(errors, {} if variant == BASELINE else others),
        "paper_relative": PAPER_RELATIVE.get(variant),
        "num_skipped": statistics.mean(run["num_skipped"] for run in runs),
        **_mean_of_dicts([shares(rows) for rows in observed]),
        "ms_per_step": median(times),
        "test_cers": list(errors.values()),
        "val_errors": [run["val_errors"] for run in runs],
        "lost_by_layer": _mean_of_dicts([lost_by_epoch(rows) for rows in observed]),
        "gradient_exponents": _exponents(observed),
        "diverged": [run["diverged"] for run in runs],
    }


def _error(run: dict[str, Any]) -> float | None:
    """Returns the test error of a run that did not diverge."""
    if run["diverged"] is not None or run.get("test_loss") is None:
        return None
    return run["test_cer"]


def _mean_of_dicts(dicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the mean by key; of lists, the mean by place, over those long enough."""
    if not dicts:
        return {}
    return {key: _mean([values[key] for values in dicts]) for key in dicts[0]}


def _mean(values: Sequence[Any]) -> Any:
    if isinstance(values[0], list):
        length = max(map(len, values))
        return [_mean([v[i] for v in values if len(v) > i]) for i in range(length)]
    return statistics.mean(values)


def _exponents(observed: Sequence[Any]) -> dict[str, float]:
    """Returns exponent → share of the nonzero gradients of all seeds."""
    if not observed:
        return {}
    first, *rest = map(gradient_histogram, observed)
    histogram = sum(rest, start=first)
    counts, num = np.asarray(histogram.counts), max(int(histogram.num_nonzero), 1)
    places = range(*_span(counts))
    return {str(histogram.lo + i): int(counts[i]) / num for i in places}


def _span(counts: np.ndarray) -> tuple[int, int]:
    places = np.flatnonzero(counts)
    return (int(places[0]), int(places[-1]) + 1) if places.size else (0, 0)
