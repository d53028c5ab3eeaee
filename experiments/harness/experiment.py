"""What an experiment declares, so that the harness can train, record and compare it.

The harness knows no metric, batch, shape or network by name: an `Experiment` names its
metrics and its table, and a `Task` says how one of its runs makes a state, a loss and
an evaluation.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import mpjax
from experiments.data.dataset import Dataset
from experiments.harness.results import Column


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that an evaluation gives.

    Attributes:
      name: its key: `val_NAME` in the rows of an epoch, `test_NAME` in a result, and
        `NAME`, averaged over the epoch, where the loss function's aux has it too.
      title: its name in tables and plots.
      is_larger_better: its direction.
      format: the format string of a value.
    """

    name: str
    title: str
    is_larger_better: bool
    format: str = "{:.4f}"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What an experiment measures, and how its results read.

    Attributes:
      name: names the working directory and the result.
      metrics: what every evaluation gives.
      headline: the name of the metric that plots show.
      more_columns: columns of the table beside those that every experiment has.
    """

    name: str
    metrics: tuple[Metric, ...]
    headline: str
    more_columns: tuple[Column, ...] = ()

    def __post_init__(self):
        """Raises ValueError unless the headline is one of the metrics."""
        if self.headline not in self.metric_names():
            raise ValueError(
                f"headline {self.headline!r} must be one of {self.metric_names()}."
            )

    def metric_names(self) -> list[str]:
        """Returns the names of the metrics, in order."""
        return [metric.name for metric in self.metrics]

    def headline_metric(self) -> Metric:
        """Returns the metric that plots show."""
        return self.metrics[self.metric_names().index(self.headline)]

    def columns(self) -> tuple[Column, ...]:
        """Returns the columns of the table of runs."""
        return (
            Column("policy", "policy"),
            Column("loss scale", "loss_scale"),
            *self.more_columns,
            *(
                Column(f"test {metric.title}", f"test_{metric.name}", metric.format)
                for metric in self.metrics
            ),
            Column("ms/step", "ms_per_step", "{:.1f}"),
            Column("compile s", "compile_s", "{:.1f}"),
            Column("skipped", "num_skipped"),
            Column("final scale", "final_loss_scale", "{:g}"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """How an experiment trains in one policy.

    Attributes:
      batches: the training data; nobody else iterates over it.
      steps_per_epoch: batches in an epoch.
      num_epochs: epochs in all.
      init: `key -> (params, model_state)`, float32 parameters, and None for a network
        without further state.
      tx: the optimizer, without loss scaling.
      loss_fn: as `mpjax.make_train_step` takes it. Scalars in its aux are recorded for
        every step; means over an epoch are weighted by its `num_examples`, if present.
      evaluate: `(state, split) -> {metric name: number}`, where split is "val", after
        every epoch, or "test", after the last.
      data: the training data in words, such as "48,000 images from the cache".
      facts: plain values to keep with the run.
      step_options: further arguments of `mpjax.make_train_step`.
      numerics_interval: steps from one histogram of exponents to the next; None counts
        nothing.
      observe: `state -> {name: JSON value}`, what to record of the training state after
        every epoch, in a row of the kind "observed"; None records nothing.
      trainable: which parameters are trained, as in `mpjax.TrainState.create`; None for
        all.
    """

    batches: Dataset
    steps_per_epoch: int
    num_epochs: int
    init: Callable[[jax.Array], tuple[Any, Any]]
    tx: optax.GradientTransformation
    loss_fn: Callable[..., Any]
    evaluate: Callable[[mpjax.TrainState, str], dict[str, float]]
    data: str
    facts: Mapping[str, Any]
    step_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    numerics_interval: int | None = None
    observe: Callable[[mpjax.TrainState], dict[str, Any]] | None = None
    trainable: str | Callable[[str], bool] | None = None

    @property
    def num_steps(self) -> int:
        """Batches in all."""
        return self.steps_per_epoch * self.num_epochs

    def make_state(
        self, tx: optax.GradientTransformation, policy: str, seed: int
    ) -> mpjax.TrainState:
        """Returns the initial state; parameters in the policy's parameter dtype."""
        init_key, key = jax.random.split(jax.random.key(seed))
        params, model_state = self.init(init_key)
        params = mpjax.get_policy(policy).cast_to_param(params)
        return mpjax.TrainState.create(
            params=params,
            tx=tx,
            model_state=model_state,
            key=key,
            trainable=self.trainable,
        )


def evaluate(
    experiment: Experiment, task: Task, state: mpjax.TrainState, split: str
) -> dict[str, float]:
    """Returns the metrics of a split, `val_loss` and so on.

    Raises:
      ValueError: if the evaluation gives other metrics than the experiment declares.
    """
    values = task.evaluate(state, split)
    names = experiment.metric_names()
    if values.keys() != set(names):
        raise ValueError(
            f"{experiment.name}: the evaluation gave {sorted(values)}, expected the "
            f"metrics that the experiment declares, {sorted(names)}."
        )
    return {f"{split}_{name}": values[name] for name in names}
