"""What another run has trained: its settings and newest weights, only read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.harness.checkpoints import Checkpoints, from_arrays, to_arrays
from experiments.harness.config import BaseConfig, split_policies
from experiments.harness.errors import CheckpointError, ConfigError, WorkdirError
from experiments.harness.files import read_json
from experiments.harness.workdir import CHECKPOINTS, check_is_run


class Weights(NamedTuple):
    """What one policy of a run has trained.

    Attributes:
      policy: its name.
      step: steps taken, skipped ones included.
      variables: a dictionary of `params` and `model_state`, NumPy arrays.
    """

    policy: str
    step: int
    variables: dict[str, Any]


class TrainedRun(NamedTuple):
    """The directory of a run, finished, stopped or going on.

    Attributes:
      path: the directory.
      settings: its config.json.
    """

    path: Path
    settings: dict[str, Any]

    def policy_names(self) -> tuple[str, ...]:
        """Returns the policies that the run trains, in order."""
        if self.settings.get("policy") is not None:
            return (self.settings["policy"],)
        return tuple(dict.fromkeys(split_policies(self.settings["policies"])))

    def has_weights(self, policy: str) -> bool:
        """Whether a policy has a checkpoint, intact or not."""
        steps = self._checkpoints(policy).glob("[0-9]*")
        return any(path.name.isdigit() for path in steps)

    def trained_policies(self) -> tuple[str, ...]:
        """Returns the policies that have a checkpoint; those not begun have none.

        Raises:
          CheckpointError: if no policy has.
        """
        names = tuple(filter(self.has_weights, self.policy_names()))
        if not names:
            raise self._no_checkpoint(", ".join(self.policy_names()))
        return names

    def weights(self, policy: str, template: Any) -> Weights:
        """Returns the weights of a policy's newest intact checkpoint.

        Args:
          policy: one of the run's.
          template: a dictionary of `params` and `model_state`, of arrays or
            `jax.ShapeDtypeStruct`; dtypes are those of the checkpoint.

        Raises:
          ConfigError: if the run has no such policy.
          CheckpointError: if it has no checkpoint, none is intact, or the weights are
            of other names or shapes.
        """
        if policy not in self.policy_names():
            raise ConfigError(
                f"{self.path} has no policy {policy!r}; it has "
                f"{', '.join(self.policy_names())}."
            )
        if not self.has_weights(policy):
            raise self._no_checkpoint(policy)
        checkpoints = Checkpoints(self._checkpoints(policy), keep=1, read_only=True)
        try:
            checkpoint = checkpoints.restore(None)
        finally:
            checkpoints.close()
        if checkpoint is None:  # deleted since, by the run that goes on
            raise self._no_checkpoint(policy)
        self._compare(policy, to_arrays(template), checkpoint.state)
        variables = from_arrays(template, checkpoint.state)
        return Weights(policy, checkpoint.step, variables)

    def _checkpoints(self, policy: str) -> Path:
        return self.path / policy / CHECKPOINTS

    def _no_checkpoint(self, policies: str) -> CheckpointError:
        why = "train until the end of an epoch, or stop it with Ctrl-C, which saves one"
        if not self.settings.get("num_checkpoints"):
            why = "it ran with --num-checkpoints 0; train again with one or more"
        return CheckpointError(f"{self.path} has no checkpoint of {policies}: {why}.")

    def _compare(self, policy: str, expected: dict[str, Any], found: Any) -> None:
        for name, like in expected.items():
            shape = found[name].shape if name in found else None
            if shape != like.shape:
                raise CheckpointError(
                    f"the checkpoint of {policy} in {self.path} is not of the network "
                    f"that its settings describe: {name} has shape "
                    f"{'none' if shape is None else shape}, expected {like.shape}. Use "
                    "the version that wrote it."
                )


def open_trained(path: Path, experiment: str) -> TrainedRun:
    """Opens the directory of a run to read from it; no lock is taken.

    Args:
      path: the directory.
      experiment: the name of the experiment that must have written it.

    Raises:
      WorkdirError: if it holds no run, or one of another experiment.
    """
    path = path.expanduser()
    settings = read_json(check_is_run(path))
    name = settings.get("experiment") if isinstance(settings, dict) else None
    if name != experiment:
        raise WorkdirError(
            f"{path} holds a run of {name or 'no experiment'}, expected {experiment}; "
            "name the --workdir of such a run."
        )
    return TrainedRun(path, settings)


def open_trained_policy(path: Path, experiment: str) -> tuple[TrainedRun, str]:
    """Opens a run, or a policy's directory in it.

    Args:
      path: RUN, whose first policy that has a checkpoint is meant, or RUN/POLICY.
      experiment: the name of the experiment that must have written it.

    Returns:
      The run and the policy.

    Raises:
      WorkdirError: if there is no run of that experiment.
      CheckpointError: if no policy has a checkpoint.
    """
    path = path.expanduser()
    if not (path / "config.json").exists() and (path.parent / "config.json").exists():
        return open_trained(path.parent, experiment), path.name
    run = open_trained(path, experiment)
    return run, run.trained_policies()[0]


def check_settings(config: BaseConfig, run: TrainedRun, names: Iterable[str]) -> None:
    """Finds flags that contradict a run; a flag at its default contradicts nothing.

    Raises:
      ConfigError: if a setting is neither the run's nor the default; names all.
    """
    ours, defaults = config.comparable(), type(config)().comparable()
    differences = [
        f"--{name.replace('_', '-')} is {run.settings.get(name)!r} there and "
        f"{ours[name]!r} here"
        for name in names
        if ours[name] not in (defaults[name], run.settings.get(name))
    ]
    if differences:
        raise ConfigError(
            f"flags contradict the run in {run.path}: {'; '.join(differences)}. Leave "
            "them out: its own settings are used."
        )


def chosen_policies(config: BaseConfig, run: TrainedRun) -> tuple[str, ...]:
    """Returns the policies that flags choose; by default all that have a checkpoint.

    Raises:
      CheckpointError: if none is chosen, and no policy has a checkpoint.
    """
    if config.policy is None and config.policies == type(config).policies:
        return run.trained_policies()
    return config.policy_names()


def own_settings(run: TrainedRun, names: Iterable[str]) -> dict[str, Any]:
    """Returns some of a run's settings.

    Raises:
      WorkdirError: if its config.json has not all of them.
    """
    missing = [name for name in names if name not in run.settings]
    if missing:
        raise WorkdirError(
            f"{run.path / 'config.json'} has no {', '.join(missing)}; it is damaged, "
            "or of another version."
        )
    return {name: run.settings[name] for name in names}


def shapes(init: Any) -> dict[str, Any]:
    """Returns `params` and `model_state` of an `init(key)`, as shapes and dtypes."""
    params, model_state = jax.eval_shape(init, jax.random.key(0))
    return {"params": params, "model_state": model_state}
