"""Short runs of `speech_ctc`, and what they compiled and read."""

import contextlib
import dataclasses
import signal

import numpy as np
import pytest
from helpers import cli_runs, tones

from experiments import speech_ctc
from experiments.data.speech.batches import SpeechBatches
from experiments.harness.checkpoints import Checkpoints, to_arrays
from mpjax._train.explain import JittedStep


def config(workdir, **changes):
    settings = {**tones.SETTINGS, "num_units": 16, "workdir": workdir, **changes}
    return speech_ctc.Config(**settings)


def corpus(**options):
    return tones.corpus(**options)


@contextlib.contextmanager
def frames_network():
    """Puts the network of the tests in the place of the real one."""
    with pytest.MonkeyPatch.context() as patch, cli_runs.compiled_once():
        patch.setattr(speech_ctc.Config, "make_network", tones.make_frames_network)
        yield


@contextlib.contextmanager
def without_pictures():
    """Leaves out what is drawn after a training."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("report", "draw_posteriors"):
            patch.setattr(speech_ctc, name, lambda *_: None)
        yield


@dataclasses.dataclass
class Record:
    """What a run read and compiled.

    Attributes:
      batches: the batches that were trained on.
      num_lowered: train and evaluation steps that were lowered ahead of time.
    """

    batches: list = dataclasses.field(default_factory=list)
    num_lowered: int = 0


@contextlib.contextmanager
def recorded():
    record = Record()
    following, lower = SpeechBatches.__next__, JittedStep.lower

    def read(batches):
        record.batches.append(following(batches))
        return record.batches[-1]

    def count(step, *args, **kwargs):
        record.num_lowered += 1
        return lower(step, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeechBatches, "__next__", read)
        patch.setattr(JittedStep, "lower", count)
        yield record


@contextlib.contextmanager
def before_batch(number, act):
    """Acts when a run asks for its batch of that number, the first being 1."""
    following, count = SpeechBatches.__next__, 0

    def read(batches):
        nonlocal count
        count += 1
        if count == number:
            act()
        return following(batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeechBatches, "__next__", read)
        yield


def stop():
    """What SIGTERM does: it ends as `Interrupted`, once the state is saved."""
    signal.raise_signal(signal.SIGTERM)


def by_name(tree):
    """Returns the leaves of a tree, under the names that a checkpoint gives them."""
    return {name: np.asarray(leaf) for name, leaf in to_arrays(tree).items()}


def newest(directory):
    """Returns the newest checkpoint of a policy's directory, as arrays by name."""
    checkpoints = Checkpoints(directory / "checkpoints", keep=1, read_only=True)
    try:
        return checkpoints.restore(None)
    finally:
        checkpoints.close()


def snapshot(directory):
    """Returns every file below a directory, with its bytes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory): path.read_bytes() for path in files}


def edit_distance(a, b):
    """The fewest insertions, deletions and substitutions from one to the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            substituted = previous[j - 1] + (x != y)
            row.append(min(previous[j] + 1, row[j - 1] + 1, substituted))
    return row[-1]
