"""Labelled images on the device, split for training, validation and test."""

from typing import NamedTuple

from experiments.data.mnist import ImageDataset
from experiments.data.on_device import DeviceDataset
from experiments.harness.errors import ConfigError

EVAL_BATCH_SIZE = 2000


class Splits(NamedTuple):
    """The three parts of a data set.

    Attributes:
      name: name of the data set in results.
      source: where the data came from.
      train: what to train on.
      val: the end of the training set, held out.
      test: the test set.
    """

    name: str
    source: str
    train: DeviceDataset
    val: DeviceDataset
    test: DeviceDataset


def split(
    dataset: ImageDataset, num_train: int, *, batch_size: int, flag: str
) -> Splits:
    """Copies a data set to the device, and holds out the end of its training set.

    Args:
      dataset: the images.
      num_train: how many of the training images to train on.
      batch_size: batch size of training.
      flag: the flag that `num_train` comes from, for the error.

    Raises:
      ConfigError: if no image would be left for training or for validation.
    """
    x, y = dataset.x_train, dataset.y_train
    if not 0 < num_train < len(x):
        raise ConfigError(
            f"{flag} leaves {max(num_train, 0)} of {len(x)} images to train on; "
            "expected some to train on and some to hold out."
        )
    return Splits(
        dataset.name,
        dataset.source,
        DeviceDataset(x[:num_train], y[:num_train], batch_size),
        DeviceDataset(x[num_train:], y[num_train:], EVAL_BATCH_SIZE),
        DeviceDataset(dataset.x_test, dataset.y_test, EVAL_BATCH_SIZE),
    )
