"""CTC decoding by prefix beam search."""

import numpy as np

from experiments.data.speech.vocabulary import BLANK

_NEVER = -np.inf


def beam_search(log_probabilities: np.ndarray, beam_width: int = 16) -> list[int]:
    """Returns the most probable sequence of symbols, over all of its alignments.

    The most probable path, collapsed, is another: the sum over the paths of a sequence
    counts. Prefixes are extended symbol by symbol, and the `beam_width` most probable
    ones are kept ("First-Pass Large Vocabulary Continuous Speech Recognition using
    Bi-Directional Recurrent DNNs", arXiv:1408.2873, algorithm 1, without a language
    model). With a beam that is wide enough the answer is exact.

    Args:
      log_probabilities: (T, V), of T frames and V symbols; 0 is the blank.
      beam_width: prefixes that are kept.

    Returns:
      The symbols' numbers, without blanks.

    Raises:
      ValueError: if the width is not positive, or a log probability is NaN.
    """
    if beam_width < 1:
        raise ValueError(f"beam_width must be 1 or more, got {beam_width}.")
    if np.isnan(log_probabilities).any():
        raise ValueError("the log probabilities hold NaN; expected finite numbers.")
    # By prefix: log probabilities of its paths that end with the blank, and of others.
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, _NEVER)}
    for frame in np.asarray(log_probabilities, np.float64):
        # No prefix can gain from more symbols than there is room for.
        symbols = np.argsort(frame)[::-1][: beam_width + 1].tolist()
        grown: dict[tuple[int, ...], tuple[float, float]] = {}
        for prefix, (blank, other) in beams.items():
            total = np.logaddexp(blank, other)
            _add(grown, prefix, blank=total + frame[BLANK])
            if prefix:
                _add(grown, prefix, other=other + frame[prefix[-1]])
            for symbol in symbols:
                if symbol != BLANK:
                    # The same symbol twice needs a blank in between.
                    before = blank if prefix and symbol == prefix[-1] else total
                    _add(grown, (*prefix, symbol), other=before + frame[symbol])
        best = sorted(grown, key=lambda p: np.logaddexp(*grown[p]), reverse=True)
        beams = {prefix: grown[prefix] for prefix in best[:beam_width]}
    return list(next(iter(beams)))


def _add(
    grown: dict[tuple[int, ...], tuple[float, float]],
    prefix: tuple[int, ...],
    blank: float = _NEVER,
    other: float = _NEVER,
) -> None:
    old = grown.get(prefix, (_NEVER, _NEVER))
    grown[prefix] = np.logaddexp(old[0], blank), np.logaddexp(old[1], other)
