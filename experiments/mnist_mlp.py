"""The Keras mixed-precision guide on MNIST: float32 beside mixed_float16.

    python -m experiments.mnist_mlp --num-units 512      # a laptop
    python -m experiments.mnist_mlp                      # 4096 units, as in the guide

784 → Dense 4096 relu → Dense 4096 relu → Dense 10 → softmax in float32; RMSprop, batch
8192, 5 epochs, the last 20 % of the training set for validation.
"""

from experiments.configs.mnist_mlp import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.mnist_mlp", Config, doc=__doc__)

from experiments.data.mnist import ImageDataset
from experiments.data.splits import Splits, split
from experiments.harness.experiment import Experiment, Metric, Task
from experiments.harness.report import report
from experiments.harness.results import Result, run_policies
from experiments.harness.training import train_policy
from experiments.models import classification
from experiments.models.mlp import MLP
from experiments.models.optimizers import rmsprop

NAME = "mnist_mlp"
NUMERICS_NAME = f"{NAME}_numerics"  # what --numerics leaves; see `report`
EXPERIMENT = Experiment(
    NAME,
    metrics=(
        Metric("loss", "loss", is_larger_better=False),
        Metric("accuracy", "accuracy", is_larger_better=True),
    ),
    headline="accuracy",
)
COLUMNS = EXPERIMENT.columns()


def main(config: Config, dataset: ImageDataset | None = None) -> Result:
    """Trains once per policy, compares, and leaves everything in the workdir.

    Args:
      config: the settings.
      dataset: the data to train on, instead of those that the config names.

    Returns:
      The result; its runs have `test_loss`, `test_accuracy`, `ms_per_step`, …

    Raises:
      ExperimentError: for data, files or checkpoints that fail, or after a signal.
      NonFiniteTrainingError: if the gradients stay non-finite.
    """
    dataset = dataset or config.load_dataset()

    def train_one(config, policy, directory):
        task = make_task(config, policy, make_splits(config, dataset))
        return train_policy(EXPERIMENT, task, config, policy, directory)[0]

    result = run_policies(NAME, config, train_one)
    title = f"{dataset.name}, MLP 2 x {config.num_units}, batch {config.batch_size}"
    report(EXPERIMENT, result, title)
    return result


def make_splits(config: Config, dataset: ImageDataset) -> Splits:
    """Holds out the end of the training set.

    Raises:
      ConfigError: if that leaves no image to train on, or none to hold out.
    """
    share = config.validation_split
    return split(
        dataset,
        round(len(dataset.x_train) * (1 - share)),
        batch_size=config.batch_size,
        flag=f"--validation-split {share}",
    )


def make_task(config: Config, policy: str, splits: Splits) -> Task:
    """Returns what one policy trains."""
    return classification.make_task(
        MLP(num_units=(config.num_units, config.num_units)),
        splits,
        rmsprop(config.learning_rate),
        policy,
        autocast=config.autocast,
        seed=config.seed,
        num_epochs=config.num_epochs,
        numerics_interval=config.numerics_interval if config.numerics else None,
    )
