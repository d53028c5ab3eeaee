"""A start from the weights of another run, kept in a file of the new one."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.configs.recognizer import NETWORK, RecognizerConfig
from experiments.data.speech.vocabulary import Vocabulary
from experiments.harness.errors import ConfigError
from experiments.harness.files import translate_os_errors
from experiments.harness.trained import (
    check_settings,
    open_trained,
    open_trained_policy,
    own_settings,
    shapes,
)
from experiments.harness.weights import read_weights, write_weights
from experiments.models.recognition import make_init
from experiments.models.recognizer import read_vocabulary

FILE = "initial.safetensors"
OUTPUT_LAYER = "classes"
Init = Callable[[jax.Array], tuple[Any, Any]]
ConfigT = TypeVar("ConfigT", bound=RecognizerConfig)


def take_network(config: ConfigT, experiment: str) -> ConfigT:
    """Returns the settings with the network of the run that `init_from` names.

    A run that is resumed has them already, and does not need the other any more.

    Args:
      config: the settings; those of the network are that run's, or the defaults.
      experiment: the experiment that must have written it.

    Raises:
      WorkdirError: if there is no such run.
      ConfigError: if a setting of the network contradicts it.
    """
    assert config.init_from is not None
    if config.resume:
        assert config.workdir is not None  # checked with the flags
        run = open_trained(config.workdir, experiment)
    else:
        run, _ = open_trained_policy(config.init_from, experiment)
    check_settings(config, run, NETWORK)
    return dataclasses.replace(config, **own_settings(run, NETWORK))


def make_init_from(
    config: RecognizerConfig, experiment: str, vocabulary: Vocabulary
) -> Init:
    """Returns the `init` of a run that starts from another, as `Task` takes it.

    The first time it writes the weights to the run's own directory, whence every policy
    and every continuation reads them, in float32. The output layer is new, and random
    by the seed, if the vocabulary is; BatchNorm's statistics are the other run's.

    Args:
      config: the settings, with the network of the run that `init_from` names, and the
        `workdir` of the new one.
      experiment: the experiment that must have written the other run.
      vocabulary: the symbols of the new one.

    Raises:
      ExperimentError: if the other run cannot be read, or the weights not be written.
    """
    assert config.workdir is not None
    init = make_init(config.make_network(vocabulary), config.num_mels)
    file = config.workdir / FILE
    if not file.exists():
        taken = _read_other(config, experiment, vocabulary)
        params, model_state = init(jax.random.key(config.seed))
        new = flatten_dict({"params": params, "model_state": model_state})
        merged = unflatten_dict({**new, **taken})
        with translate_os_errors(config.workdir):
            write_weights(file, merged, architecture=experiment)
    template = shapes(init)

    def read(_: jax.Array) -> tuple[Any, Any]:
        variables = jax.tree.map(jnp.asarray, read_weights(file, template))
        return variables["params"], variables["model_state"]

    return read


def make_trainable(pattern: str, init: Init) -> Callable[[str], bool]:
    """Returns a predicate on a parameter's path, for `mpjax.TrainState.create`.

    Args:
      pattern: a regular expression; a parameter is trained if it is found in its path,
        such as `params/classes/kernel`.
      init: makes the parameters.

    Raises:
      ConfigError: if it is found in no path.
    """
    params, _ = init(jax.random.key(0))
    paths = flatten_dict({"params": params}, sep="/")
    if not any(re.search(pattern, path) for path in paths):
        layers = dict.fromkeys("/".join(path.split("/")[:2]) for path in paths)
        raise ConfigError(
            f"--trainable {pattern!r} is found in no parameter's path, such as "
            f"{next(iter(paths))}; the layers are {', '.join(layers)}."
        )
    return lambda path: bool(re.search(pattern, f"params/{path}"))


def _read_other(
    config: RecognizerConfig, experiment: str, vocabulary: Vocabulary
) -> dict[tuple[str, ...], Any]:
    """Returns the other run's weights by path, without an output layer of no use."""
    assert config.init_from is not None
    run, policy = open_trained_policy(config.init_from, experiment)
    known = read_vocabulary(run.path)
    template = shapes(make_init(config.make_network(known), config.num_mels))
    weights = run.weights(policy, template)
    taken = flatten_dict(weights.variables)
    text = f"weights of {run.path}, {policy} after {weights.step} steps"
    if known != vocabulary:
        taken = {k: v for k, v in taken.items() if k[:2] != ("params", OUTPUT_LAYER)}
        text += f"; a new output layer for {len(vocabulary.symbols)} symbols"
    print(text, flush=True)
    return taken
