"""Seconds of audio of many recordings, from their headers, kept in the cache.

The headers of 100,000 files take from seconds to many minutes, by the disk. The key in
the cache is a hash of the recordings' paths, sizes and times of change, so that a
corpus that changed is measured anew.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from experiments.data import cache
from experiments.data.speech.recordings import RecordedUtterances, Recording
from experiments.harness.errors import AudioError, DataError

# Fewer are measured each time, in about a second.
MIN_CACHED = 2_000


def recorded(recordings: Sequence[Recording], *, name: str) -> RecordedUtterances:
    """Measures recordings, or finds their durations in the cache.

    Args:
      recordings: in the order of the split.
      name: what the progress bar and the file in the cache are called.

    Raises:
      DataError: if soundfile is not installed. A cache that cannot be written is only
        reported.
    """
    if len(recordings) < MIN_CACHED:
        return RecordedUtterances(recordings, _measure(recordings, name))
    folder = cache.cache_dir() / "speech"
    path = folder / f"durations-{name}-{_listing_hash(recordings)}.npz"
    kept = _read(path, len(recordings))
    durations_s = _measure(recordings, name, kept)
    if kept is None or not np.array_equal(kept, durations_s, equal_nan=True):
        try:
            with cache.locked(folder):
                cache.write_npz(path, {"duration_s": durations_s})
        except DataError as error:
            cache.report(f"the durations of {name} are not kept: {error}")
    return RecordedUtterances(recordings, durations_s)


def _measure(
    recordings: Sequence[Recording], name: str, known: np.ndarray | None = None
) -> np.ndarray:
    """Returns (len(recordings),) float64 seconds, NaN where a header is unreadable.

    What is known already, and is not NaN, is not measured.
    """
    durations_s = np.full(len(recordings), np.nan) if known is None else known.copy()
    places = np.flatnonzero(np.isnan(durations_s)).tolist()
    for place in tqdm(places, f"headers of {name}", disable=None, leave=False):
        try:
            durations_s[place] = recordings[place].duration_s()
        except AudioError:
            continue  # `select` reads it again and raises, or counts it
    return durations_s


def _read(path: Path, count: int) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        durations_s = cache.read_npz(path).get("duration_s")
    except DataError as error:
        cache.report(f"{path} is damaged ({error}); measuring anew")
        return None
    if durations_s is None or durations_s.shape != (count,):
        cache.report(f"{path} holds something else; measuring anew")
        return None
    return durations_s


def _listing_hash(recordings: Sequence[Recording]) -> str:
    sha256 = hashlib.sha256()
    stats: dict[str, tuple[int, int]] = {}
    for recording in recordings:
        if recording.path not in stats:
            stats[recording.path] = _size_and_time(recording.path)
        place = (recording.path, recording.offset, recording.num_bytes)
        sha256.update(repr((*place, stats[recording.path])).encode())
    return sha256.hexdigest()[:16]


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return stat.st_size, stat.st_mtime_ns
