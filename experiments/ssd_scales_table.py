"""The table of `ssd_scales`: ways to train, beside what others measured."""

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.configs.ssd_scales import VARIANTS
from experiments.harness.intervals import compare_by_seed
from experiments.harness.results import Column, median

BASELINE = "float32"
# mAP in per cent. "Mixed Precision Training", arXiv:1710.03740, section 3.2: SSD on
# Pascal VOC, with a scale of 8.
PAPER = {"float32": "76.9", "unscaled": "diverges", "scale_8": "77.1"}
# "Adaptive Loss Scaling", arXiv:1910.12385: SSD512 on Pascal VOC.
ADAPTIVE_PAPER = {
    "float32": "78.94",
    "scale_8": "78.83",
    "scale_128": "78.71",
    "dynamic": "75.04",
    "layer-wise adaptive": "79.27",
}
COLUMNS = (
    Column("trained in", "variant"),
    Column("seeds", "num_seeds"),
    Column("diverged", "num_diverged"),
    Column("mAP (VOC07) ± s.d.", "map07"),
    Column("points to float32 (95 %)", "difference"),
    Column("skipped", "num_skipped", "{:.3g}"),
    Column("final scale", "final_loss_scale", "{:g}"),
    Column("gradients that are zero", "zero_gradients", "{:.1%}"),
    Column("of float32's nonzero, zero at its scale", "lost_gradients", "{:.3%}"),
    Column("the paper's SSD300", "paper"),
    Column("SSD512 of arXiv:1910.12385", "adaptive_paper"),
)


def summarize(
    runs: Sequence[dict[str, Any]], variants: Sequence[str], *, beside_papers: bool
) -> list[dict[str, Any]]:
    """Returns a row per variant, and one for each way that only others have measured.

    Args:
      runs: the results of single runs, as `ssd_scales` makes them; a run that diverged
        has `diverged` and no `test_map07`.
      variants: the variant of each row.
      beside_papers: whether the rows have what papers measured, beside which a setting
        that none of them had cannot stand.

    Returns:
      Rows with the keys of `COLUMNS`: means over the seeds that did not diverge;
      `difference` in points, paired by seed, with Student's 95 % interval. Beside them
      `test_map07s` and `val_map07s` by seed, and `diverged`, by seed.
    """
    by_variant: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], {})[run["seed"]] = run
    baseline = by_variant.get(BASELINE, {})
    rows = [_row(name, by_variant[name], baseline) for name in variants]
    if not beside_papers:
        return rows
    for row in rows:
        row["paper"] = PAPER.get(row["variant"])
        row["adaptive_paper"] = ADAPTIVE_PAPER.get(row["variant"])
    others = [
        {"variant": f"{name} (others')", "adaptive_paper": value}
        for name, value in ADAPTIVE_PAPER.items()
        if name not in VARIANTS
    ]
    return rows + others


def _row(
    variant: str, seeds: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    runs = list(seeds.values())
    values = {seed: _map07(run) for seed, run in seeds.items()}
    others = {seed: _map07(run) for seed, run in baseline.items()}
    finished = [value for value in values.values() if value is not None]
    scales = [run["final_loss_scale"] for run in runs if run.get("final_loss_scale")]
    return {
        "variant": variant,
        "policy": runs[0]["policy"],
        "loss_scale": runs[0]["loss_scale"],
        "num_seeds": len(runs),
        "num_diverged": len(runs) - len(finished),
        "map07": _mean_and_deviation(finished),
        **compare_by_seed(values, {} if variant == BASELINE else others),
        "num_skipped": statistics.mean(run["num_skipped"] for run in runs),
        "final_loss_scale": median(scales),
        "zero_gradients": _mean([run.get("zero_gradients") for run in runs]),
        "lost_gradients": _mean([run.get("lost_gradients") for run in runs]),
        "ms_per_step": median([r["ms_per_step"] for r in runs if r.get("ms_per_step")]),
        "test_map07s": list(values.values()),
        "val_map07s": [run["val_map07s"] for run in runs],
        "diverged": [run["diverged"] for run in runs],
    }


def _map07(run: dict[str, Any]) -> float | None:
    """Returns the test's mAP of a run that did not diverge."""
    return None if run["diverged"] is not None else run.get("test_map07")


def _mean_and_deviation(values: Sequence[float]) -> str | None:
    """Returns the mean in per cent and, of several, the sample deviation."""
    if not values:
        return None
    mean = f"{100 * statistics.mean(values):.2f}"
    if len(values) == 1:
        return f"{mean} %"
    return f"{mean} ± {100 * statistics.stdev(values):.2f} %"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
