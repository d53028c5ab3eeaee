"""The utterances of a split that can be trained on, and why the others cannot."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm.auto import tqdm

from experiments.data.skipped import report_skipped
from experiments.data.speech.corpus import Utterance, Utterances
from experiments.harness.errors import AudioError, DataError


class Selection:
    """Some of the utterances of a split, in their order.

    Attributes:
      left_out: how many utterances were left out, by reason, those of the selection
        that this one was made from included.
    """

    def __init__(
        self,
        utterances: Utterances,
        indices: Sequence[int],
        left_out: Mapping[str, int],
    ):
        before = utterances.left_out if isinstance(utterances, Selection) else {}
        self.left_out = dict(Counter(before) + Counter(left_out))
        self._utterances = utterances
        self._indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Utterance:
        return self._utterances[int(self._indices[index])]

    def samples(self, index: int) -> np.ndarray:
        """Returns the audio of an utterance, (N,) float32 in [-1, 1] at 16 kHz.

        Raises:
          AudioError: if the audio cannot be read; names the file and the reason.
        """
        return self._utterances.samples(int(self._indices[index]))

    def summary(self) -> str:
        """Returns how many utterances are kept and left out: "8 kept, 2 too long"."""
        reasons = [f"{count} {reason}" for reason, count in self.left_out.items()]
        return ", ".join([f"{len(self)} kept", *reasons])


def select(
    utterances: Utterances,
    *,
    min_duration_s: float = 0.0,
    max_duration_s: float = math.inf,
    skip_bad: bool = False,
) -> Selection:
    """Leaves out utterances that are too short, too long, or have no text.

    Args:
      utterances: the split to choose from.
      min_duration_s: the shortest duration that is kept.
      max_duration_s: the longest duration that is kept.
      skip_bad: whether recordings with an unreadable header are left out and counted,
        as "unreadable", instead of an error.

    Raises:
      AudioError: if a header cannot be read; names the file and the reason.
      DataError: if no utterance is left.
    """
    indices: list[int] = []
    left_out: Counter[str] = Counter()
    problems: list[str] = []
    for index in range(len(utterances)):
        try:
            reason = _reason(utterances, index, min_duration_s, max_duration_s)
        except AudioError as error:
            _skip(error, problems, skip_bad)
            reason = "unreadable"
        if reason:
            left_out[reason] += 1
        else:
            indices.append(index)
    return _selection(utterances, indices, left_out, problems)


def check_audio(
    utterances: Utterances, *, skip_bad: bool = False, num_threads: int = 4
) -> Selection:
    """Reads every recording of a split once, to find what its header does not tell.

    Args:
      utterances: the split.
      skip_bad: whether unreadable recordings are left out and counted, as
        "unreadable", instead of an error.
      num_threads: how many are read at a time.

    Raises:
      AudioError: for the first recording that cannot be read; names the file and the
        reason.
      DataError: if no utterance is left.
    """
    problems: list[str] = []
    indices: list[int] = []

    def problem(index: int) -> AudioError | None:
        try:
            utterances.samples(index)
        except AudioError as error:
            return error
        return None

    executor = ThreadPoolExecutor(num_threads)
    try:
        errors = executor.map(problem, range(len(utterances)))
        bar = tqdm(errors, "reading", len(utterances), disable=None, leave=False)
        for index, error in enumerate(bar):
            if error is None:
                indices.append(index)
            else:
                _skip(error, problems, skip_bad)
    finally:
        executor.shutdown(cancel_futures=True)
    left_out = {"unreadable": len(problems)}
    return _selection(utterances, indices, left_out, problems)


def _reason(utterances: Utterances, index: int, low_s: float, high_s: float) -> str:
    """Returns why an utterance is left out; "" where it is kept."""
    utterance = utterances[index]
    duration_s = utterance.duration_s
    if math.isnan(duration_s):  # its header could not be read; reading it says why
        utterances.samples(index)
        raise AudioError(f"{utterance.id} could not be read before; run again.")
    if not utterance.text.strip():
        return "without text"
    if duration_s < low_s:
        return "too short"
    return "too long" if duration_s > high_s else ""


def _skip(error: AudioError, problems: list[str], skip_bad: bool) -> None:
    if not skip_bad:
        raise AudioError(f"{error} --skip-bad leaves such recordings out.") from error
    problems.append(str(error))


def _selection(
    utterances: Utterances,
    indices: list[int],
    left_out: Mapping[str, int],
    problems: list[str],
) -> Selection:
    selection = Selection(utterances, indices, left_out)
    report_skipped(problems, "recordings")
    if not indices:
        raise DataError(
            f"no utterance is left of {len(utterances)}: {selection.summary()}; check "
            "the corpus, and the limits of duration."
        )
    return selection
