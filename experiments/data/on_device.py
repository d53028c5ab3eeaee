"""Batches of a small dataset that lives on the device whole."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.errors import ConfigError

Batch = dict[str, jax.Array]


class DeviceDataset:
    """Images and labels on the device; every batch is gathered there.

    `N` denotes the number of examples, `B` the batch size, `D` the pixels of an image.
    A batch holds `image` (B, D), `label` int32 (B,) and `mask` bool (B,), which is
    False for padding. Going from one to the next moves nothing between host and device.

    Attributes:
      num_examples: N.
      batch_size: B.
      num_batches: in an epoch; the last may hold padding.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int):
        """Copies the data to the device, once.

        Args:
          images: (N, ...); uint8 are divided by 255, floats are taken as they are.
          labels: integers (N,).
          batch_size: B, no more than N; the last batch of an epoch is padded to it.

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
        self._images = jnp.asarray(images.reshape(len(images), -1))
        self._labels = jnp.asarray(labels, jnp.int32)
        self._take = jax.jit(self._gather)
        self._order = jax.jit(self._shuffled)

    def in_order(self) -> Iterator[Batch]:
        """Yields one epoch in the order of the data."""
        order = jnp.arange(self.num_examples)
        index = jnp.asarray(0, jnp.int32)
        for _ in range(self.num_batches):
            batch, index = self._take(self._images, self._labels, order, index)
            yield batch

    def shuffled(self, seed: int, first_step: int = 0) -> Iterator[Batch]:
        """Yields batches for ever, each epoch in an order of its own.

        Args:
          seed: of all orders.
          first_step: how many batches to pass over; the rest is as without it.
        """
        key = jax.random.key(seed)
        first_epoch, first_batch = divmod(first_step, self.num_batches)
        epoch = jnp.asarray(first_epoch, jnp.int32)
        index = jnp.asarray(first_batch, jnp.int32)
        while True:
            order, epoch = self._order(key, epoch)
            for _ in range(first_batch, self.num_batches):
                batch, index = self._take(self._images, self._labels, order, index)
                yield batch
            first_batch = 0

    def _shuffled(
        self, key: jax.Array, epoch: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(key, epoch)
        return jax.random.permutation(key, self.num_examples), epoch + 1

    def _gather(
        self, images: jax.Array, labels: jax.Array, order: jax.Array, index: jax.Array
    ) -> tuple[Batch, jax.Array]:
        """Returns batch number `index`, and the next number, 0 after the last.

        Both stay on the device: a number from the host would be a transfer.
        """
        position = index * self.batch_size + jnp.arange(self.batch_size)
        mask = position < self.num_examples
        chosen = order[jnp.where(mask, position, 0)]
        image = images[chosen]
        if image.dtype == jnp.uint8:
            image = image.astype(jnp.float32) / 255
        batch = {"image": image, "label": labels[chosen], "mask": mask}
        return batch, (index + 1) % self.num_batches
