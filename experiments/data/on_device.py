"""Batches of a small dataset that lives on the device whole."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Batch = dict[str, jax.Array]


class DeviceDataset:
    """Images and labels on the device; every batch is gathered there.

    `N` denotes the number of examples, `B` the batch size, `D` the pixels of an image.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int):
        """Copies the data to the device, once.

        Args:
          images: (N, ...); uint8 are divided by 255, floats are taken as they are.
          labels: integers (N,).
          batch_size: B; the last batch of an epoch is padded to it.
        """
        self.num_examples = len(images)
        self.batch_size = min(batch_size, self.num_examples)
        self.num_batches = -(-self.num_examples // self.batch_size)
        self._images = jnp.asarray(images.reshape(len(images), -1))
        self._labels = jnp.asarray(labels, jnp.int32)
        self._take = jax.jit(self._gather)
        self._order = jax.jit(self._shuffled)

    def in_order(self) -> Iterator[Batch]:
        """Yields one epoch in the order of the data."""
        order = jnp.arange(self.num_examples)
        yield from self._batches(order, 0)

    def shuffled(self, seed: int, first_step: int = 0) -> Iterator[Batch]:
        """Yields batches for ever, each epoch in an order of its own.

        Args:
          seed: of all orders.
          first_step: how many batches to pass over; the rest is as without it.
        """
        key = jax.random.key(seed)
        first_epoch, first_batch = divmod(first_step, self.num_batches)
        epoch = jnp.asarray(first_epoch, jnp.int32)
        while True:
            order, epoch = self._order(key, epoch)
            yield from self._batches(order, first_batch)
            first_batch = 0

    def _batches(self, order: jax.Array, first_batch: int) -> Iterator[Batch]:
        index = jnp.asarray(first_batch, jnp.int32)
        for _ in range(first_batch, self.num_batches):
            batch, index = self._take(self._images, self._labels, order, index)
            yield batch

    def _shuffled(self, key: jax.Array, epoch: jax.Array) -> tuple[jax.Array, Any]:
        key = jax.random.fold_in(key, epoch)
        return jax.random.permutation(key, self.num_examples), epoch + 1

    def _gather(self, images, labels, order, index):
        """Returns batch number `index`: image (B, D), label (B,), mask (B,).

        The mask is False for padding, so that every batch has the same shape.
        """
        position = index * self.batch_size + jnp.arange(self.batch_size)
        mask = position < self.num_examples
        chosen = order[jnp.where(mask, position, 0)]
        image = images[chosen]
        if image.dtype == jnp.uint8:
            image = image.astype(jnp.float32) / 255
        return {"image": image, "label": labels[chosen], "mask": mask}, index + 1
