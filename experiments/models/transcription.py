"""What a trained run hears in recordings."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.configs.recognizer import NETWORK, RecognizerConfig
from experiments.harness.trained import (
    check_settings,
    chosen_policies,
    open_trained,
    own_settings,
    shapes,
)
from experiments.models.recognition import make_init
from experiments.models.recognizer import (
    make_recognizer,
    read_recordings,
    read_vocabulary,
)

_TAKEN = (*NETWORK, "autocast", "min_duration_s", "max_duration_s")
_FREE = ("policies", "policy", "beam_width")  # what a transcription may choose


class Transcript(NamedTuple):
    """What is heard in a recording.

    Attributes:
      file: the recording.
      policy: the policy whose weights hear, and that they compute in.
      step: how many steps they were trained for.
      text: what they hear.
    """

    file: Path
    policy: str
    step: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}, {self.policy} after {self.step} steps: {self.text}"


def transcribe(config: RecognizerConfig, experiment: str) -> Iterator[Transcript]:
    """Yields what each policy of a run hears; writes nothing.

    The network, the vocabulary and the newest checkpoint of each policy are read from
    the run. Files and settings are checked before anything is heard.

    Args:
      config: names the run, as `workdir`, and the recordings. `policy` or `policies`
        choose some of those that are trained; `beam_width` is its own.
      experiment: the experiment that must have written the run.

    Raises:
      WorkdirError: if there is no such run.
      ConfigError: if a setting contradicts the run.
      AudioError: if a recording cannot be read, or is too short.
      CheckpointError: if the run has no checkpoint.
    """
    assert config.workdir is not None  # checked with the flags
    run = open_trained(config.workdir, experiment)
    names = [name for name in config.comparable() if name not in _FREE]
    check_settings(config, run, names)
    policies = chosen_policies(config, run)
    config = dataclasses.replace(config, **own_settings(run, _TAKEN))
    vocabulary = read_vocabulary(run.path)
    recordings = read_recordings(
        config.transcribe, min_duration_s=config.min_duration_s
    )
    model = config.make_network(vocabulary)
    template = shapes(make_init(model, config.num_mels))
    for policy in policies:
        weights = run.weights(policy, template)
        recognizer = make_recognizer(
            model,
            weights.variables,
            vocabulary,
            policy,
            autocast=config.autocast,
            num_mels=config.num_mels,
            decode=config.make_decoder(),
        )
        for file, samples in zip(config.transcribe, recordings, strict=True):
            text = recognizer.text(recognizer.log_probabilities(samples))
            yield Transcript(file, policy, weights.step, text)
