"""Batches of a small dataset that stays whole on the device."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.dataset import read_position, shard_rows
from experiments.harness.errors import ConfigError

Batch = dict[str, jax.Array]


class DeviceDataset:
    """Labelled images on the device; batches are taken from them there.

    `N` denotes the number of examples, `B` the batch size. A batch holds `image`
    (B, ...), with the axes that the images have, `label` int32 (B,) and `mask` bool
    (B,), which is False for padding. Iterating moves nothing between host and device.

    Attributes:
      num_examples: N.
      batch_size: B.
      num_batches: batches in an epoch; the last may hold padding.
      image_shape: shape of one image.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int):
        """Copies the data to the device, once.

        Args:
          images: (N, ...); uint8 are divided by 255, floats are taken as they are.
          labels: integers (N,).
          batch_size: B, reduced to N where it is larger; the last batch of an epoch is
            padded to it.

        Raises:
          ConfigError: without examples, or for a batch size below 1.
          ValueError: if there are not as many labels as images.
        """
        if len(images) != len(labels):
            raise ValueError(
                f"expected one label per image, got {len(labels)} for {len(images)}; "
                "slice both alike."
            )
        if batch_size < 1 or not len(images):
            raise ConfigError(
                "expected at least one example and a batch size of at least 1, got "
                f"{len(images)} and {batch_size}; choose another split or --batch-size."
            )
        self.num_examples = len(images)
        self.batch_size = min(batch_size, self.num_examples)
        self.num_batches = -(-self.num_examples // self.batch_size)
        self.image_shape = images.shape[1:]
        self._images = jnp.asarray(images)
        self._labels = jnp.asarray(labels, jnp.int32)
        self._rows = (0, self.batch_size)  # the rows of each batch that it gives

    def in_order(self) -> Iterator[Batch]:
        """Yields one epoch in the order of the data."""
        order = jnp.arange(self.num_examples)
        index = jnp.asarray(0, jnp.int32)
        for _ in range(self.num_batches):
            batch, index = self.take(order, index)
            yield batch

    def shuffled(self, seed: int) -> "ShuffledBatches":
        """Returns an endless `Dataset`; each epoch has an order of its own.

        Args:
          seed: determines the orders.
        """
        return ShuffledBatches(self, seed)

    def shard(self, index: int, count: int) -> "DeviceDataset":
        """Returns the same data with part `index` of `count` of every batch.

        `num_examples`, `batch_size` and `num_batches` stay those of the whole.

        Raises:
          ValueError: if there is no such part.
          ConfigError: if `count` does not divide the batch.
        """
        part = copy.copy(self)
        part._rows = shard_rows(self._rows, index, count)
        return part

    def take(self, order: jax.Array, index: jax.Array) -> tuple[Batch, jax.Array]:
        """Returns batch number `index` of an order, and the next number.

        Args:
          order: a permutation of the examples, int (N,).
          index: int32; after the last batch of an epoch comes 0. It stays on the
            device, because a number from the host would be a transfer.
        """
        shape = (self.batch_size, *self._rows)
        return _take(self._images, self._labels, order, index, shape)


class ShuffledBatches:
    """The endless, shuffled batches of a `DeviceDataset`: a `Dataset`."""

    def __init__(self, dataset: DeviceDataset, seed: int):
        """Begins with the first batch of the first epoch."""
        self._dataset = dataset
        self._seed = seed
        self._key = jax.random.key(seed)
        self.set_state({"num_batches": 0})

    def __iter__(self) -> Iterator[Batch]:
        """Returns itself."""
        return self

    def __next__(self) -> Batch:
        """Returns the next batch; the first of an epoch shuffles the data."""
        order, epoch, index = self._cursor or self._place()
        if order is None or self._num_batches % self._dataset.num_batches == 0:
            order, epoch = _shuffle(self._key, epoch, self._dataset.num_examples)
        batch, index = self._dataset.take(order, index)
        self._cursor = order, epoch, index
        self._num_batches += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns `{"num_batches": batches given so far}`."""
        return {"num_batches": self._num_batches}

    def set_state(self, state: Any) -> None:
        """Moves to a position that `get_state` returned.

        Raises:
          ValueError: if it is the state of another kind of data set.
        """
        self._num_batches = read_position(state)
        # On the device: the order, and the numbers of the next epoch and batch.
        self._cursor: tuple[jax.Array | None, jax.Array, jax.Array] | None = None

    def shard(self, index: int, count: int) -> "ShuffledBatches":
        """Returns part `index` of `count` of every batch; see `Dataset.shard`."""
        part = ShuffledBatches(self._dataset.shard(index, count), self._seed)
        part.set_state(self.get_state())
        return part

    def _place(self) -> tuple[None, jax.Array, jax.Array]:
        """Puts the numbers of epoch and batch on the device; there is no order yet."""
        epoch, index = divmod(self._num_batches, self._dataset.num_batches)
        return None, jnp.asarray(epoch, jnp.int32), jnp.asarray(index, jnp.int32)


@functools.partial(jax.jit, static_argnums=2)
def _shuffle(
    key: jax.Array, epoch: jax.Array, num_examples: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the order of an epoch, and the number of the next one."""
    key = jax.random.fold_in(key, epoch)
    return jax.random.permutation(key, num_examples), epoch + 1


@functools.partial(jax.jit, static_argnums=4)
def _take(
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    index: jax.Array,
    shape: tuple[int, int, int],
) -> tuple[Batch, jax.Array]:
    """Returns rows `first_row` to `first_row + num_rows` of a batch; see `take`."""
    batch_size, first_row, num_rows = shape
    num_examples = len(labels)
    position = index * batch_size + first_row + jnp.arange(num_rows)
    mask = position < num_examples
    chosen = order[jnp.where(mask, position, 0)]
    image = images[chosen]
    if image.dtype == jnp.uint8:
        image = image.astype(jnp.float32) / 255
    batch = {"image": image, "label": labels[chosen], "mask": mask}
    return batch, (index + 1) % -(-num_examples // batch_size)
