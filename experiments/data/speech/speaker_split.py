"""Divides recordings into training, validation and test sets by speaker."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from experiments.data import cache
from experiments.data.speech.recordings import Recording
from experiments.harness.errors import DataError

HELD_OUT = 0.1
"""At least this share of the utterances is in the test set, and in the validation."""


def split_by_speaker(
    recordings: Sequence[Recording], *, seed: int, name: str
) -> tuple[list[Recording], list[Recording], list[Recording]]:
    """Holds out whole speakers, a tenth of the utterances or more for each set.

    Where fewer than three speakers are known it holds out utterances, and reports it.
    The order of the recordings does not matter, and each set keeps it.

    Args:
      recordings: what to divide; those without a speaker count as a speaker each.
      seed: which speakers are held out.
      name: what errors call the corpus.

    Returns:
      Training, validation and test set.

    Raises:
      DataError: if there are fewer than three utterances.
    """
    if len(recordings) < 3:
        raise DataError(
            f"{name} holds {len(recordings)} utterances; expected three or more, one "
            "each to train on, to validate and to test."
        )
    groups = [recording.speaker or f"\0{recording.id}" for recording in recordings]
    if len(set(groups)) < 3:
        cache.report(
            f"{name} has fewer than three speakers, so its test set has utterances, "
            "not speakers, that are not trained on"
        )
        groups = [recording.id for recording in recordings]
    split_of = _assign(Counter(groups), seed)
    pairs = list(zip(groups, recordings, strict=True))
    train, val, test = (
        [recording for group, recording in pairs if split_of[group] == split]
        for split in range(3)
    )
    return train, val, test


def _assign(sizes: Counter[str], seed: int) -> dict[str, int]:
    """Returns 0, 1 or 2 for each group: training, validation or test.

    Groups are taken in the order of a hash. Test is filled first, then validation;
    each stops at its share, or where the sets after it would have no group left.
    """

    def digest(group: str) -> bytes:
        return hashlib.sha256(f"{seed}:{group}".encode()).digest()

    order = sorted(sizes, key=digest)
    target = HELD_OUT * sizes.total()
    split_of = {}
    for split in (2, 1):
        taken = 0
        while taken < target and len(order) > split:
            group = order.pop()
            split_of[group] = split
            taken += sizes[group]
    return split_of | dict.fromkeys(order, 0)
