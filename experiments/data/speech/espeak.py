"""Mandarin speech by espeak-ng, from a process of its own.

espeak-ng keeps state from one line to the next: the same lines in the same order, in a
fresh process, give the same samples on one machine.
"""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.extra import import_extra, install_command
from experiments.harness.errors import DataError

PACKAGE = "espeakng-loader"
TIMEOUT_S = 120.0  # about 2 s are needed for the lines of one process

_WORKER = Path(__file__).with_name("espeak_worker.py")


class Line(NamedTuple):
    """What is said, and how.

    Attributes:
      voice: a variant of espeak-ng's voices, such as m3 or f2.
      text: pinyin syllables with tone digits, between spaces: "ni3 hao3".
      rate_wpm: speed in words per minute, from 80 to 450.
      pitch: from 0 to 99; 50 is the voice's own.
    """

    voice: str
    text: str
    rate_wpm: int
    pitch: int


def version() -> str:
    """Returns the version of the package that brings espeak-ng.

    Raises:
      DataError: if it is not installed.
    """
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"Mandarin is synthesised by espeak-ng, and {PACKAGE} is not installed: "
            f"{install_command('speech')}"
        ) from None


def speak(lines: Sequence[Line], seed: int = 1) -> tuple[list[np.ndarray], int]:
    """Says lines in a fresh process, which has ended when this returns.

    Args:
      lines: what to say, in this order; a few hundred at most, since the wait is
        bounded.
      seed: of the random numbers that breathy voices are made of.

    Returns:
      the samples of each line, int16 (N,), and their rate in Hz.

    Raises:
      DataError: if espeak-ng is not installed, refuses a line, dies, or does not finish
        in two minutes.
    """
    library, data = _library()
    request = {"library": library, "data": data, "seed": seed, "lines": list(lines)}
    try:
        done = subprocess.run(
            # It needs the standard library only, so nothing else gets in its way.
            [sys.executable, "-I", "-S", str(_WORKER)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"espeak-ng did not say {len(lines)} lines in {TIMEOUT_S:.0f} s; is this "
            "machine very busy? Try again."
        ) from None
    if done.returncode:
        raise _failure(done.returncode, done.stderr.decode(errors="replace"))
    return _split(done.stdout, len(lines))


def _library() -> tuple[str, str]:
    """Returns the paths of the shared library and of its data, without loading it."""
    loader = import_extra("espeakng_loader", extra="speech")
    try:
        return loader.get_library_path(), loader.get_data_path()
    except RuntimeError as error:
        raise _failure(1, str(error)) from error


def _split(output: bytes, num_lines: int) -> tuple[list[np.ndarray], int]:
    header, _, samples = output.partition(b"\n")
    try:
        answer = json.loads(header)
        lengths, rate_hz = answer["num_samples"], answer["sample_rate_hz"]
        audio = np.frombuffer(samples, np.int16)
    except (ValueError, KeyError, TypeError) as error:
        raise _failure(0, f"an answer that cannot be read: {error}") from error
    if len(lengths) != num_lines or sum(lengths) != len(audio):
        raise _failure(0, f"{len(lengths)} of {num_lines} lines")
    return np.split(audio, np.cumsum(lengths)[:-1]), rate_hz


def _failure(code: int, message: str) -> DataError:
    reason = (message.strip().splitlines() or ["no message"])[-1]
    return DataError(
        f"the process of espeak-ng failed (exit code {code}: {reason}). If it goes on, "
        f"install it anew: {install_command('speech')}"
    )
