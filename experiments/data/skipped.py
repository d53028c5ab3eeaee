"""What is said of bad examples that --skip-bad leaves out."""

from collections.abc import Sequence

from experiments.data import cache

MAX_REPORTED = 5


def report_skipped(problems: Sequence[str], noun: str) -> None:
    """Prints the first problems on stderr, and how many more there are.

    Args:
      problems: one sentence per example.
      noun: what the examples are: "recordings", "images".
    """
    for problem in problems[:MAX_REPORTED]:
        cache.report(f"skipped: {problem}")
    if len(problems) > MAX_REPORTED:
        cache.report(f"skipped: {len(problems) - MAX_REPORTED} more {noun}")
