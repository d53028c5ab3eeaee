"""Padded batches of annotated images, on the device."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.dataset import read_position, shard_rows
from experiments.data.detection.augment import Augmentation, Sample, augment
from experiments.data.detection.examples import Examples
from experiments.data.extra import import_extra
from experiments.harness.errors import ConfigError

Batch = dict[str, jax.Array]
# Of the RGB images that networks are trained on, and weights are published for.
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ENDLESS = 2**31 - 1  # batches; Grain wants a number


class DetectionBatches:
    """The endless, shuffled batches of a split: a `Dataset`.

    B denotes the batch size, S the side of an image, C its channels, M the objects of
    the image that has most. A batch holds `image` (B, S, S, C) float32, `boxes`
    (B, M, 4) float32, corners in shares of the image, `labels` int32 (B, M), from 1,
    and `mask` bool (B, M), False for padding. Gray pixels are from 0 to 1; RGB is
    normalized by ImageNet's mean and deviation.

    Which images are in a batch, and how they are augmented, depends on the seed and on
    the number of the batch alone. What is left of an epoch after its last whole batch
    is not trained on. Images in files are read ahead of the training by Grain.

    Attributes:
      num_examples: images.
      batch_size: B.
      num_batches: batches in an epoch.
      image_shape: (S, S, C).
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        max_objects: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ):
        """Packs the objects of all images; reads one image.

        Args:
          examples: the images.
          batch_size: B, reduced to the number of images where it is larger.
          max_objects: M, at least the objects of any image.
          seed: determines the order of every epoch, and the augmentation.
          augmentation: what is done to the images; None for nothing.

        Raises:
          ConfigError: without images.
        """
        if not examples.annotations:
            raise ConfigError("expected at least one image to make batches of.")
        self.num_examples = len(examples.annotations)
        self.batch_size = min(batch_size, self.num_examples)
        self.num_batches = self.num_examples // self.batch_size
        self.image_shape = examples.read(np.array([0])).shape[1:]
        self._examples = examples
        self._objects = pack(examples, max_objects)
        self._seed, self._key = seed, jax.random.key(seed)
        self._augmentation = augmentation or Augmentation()
        self._rows = (0, self.batch_size)
        self.set_state({"num_batches": 0})

    def __iter__(self) -> Iterator[Batch]:
        """Returns itself."""
        return self

    def __next__(self) -> Batch:
        """Returns the next batch."""
        if self._reader is None:
            self._reader = self._read_from(self._position)
        raw = next(self._reader)
        position = np.asarray(self._position, np.int32)
        shape = self.batch_size, *self._rows
        batch = _prepare(raw, self._key, position, self._augmentation, shape)
        self._position += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns `{"num_batches": batches given so far}`."""
        return {"num_batches": self._position}

    def set_state(self, state: Any) -> None:
        """Moves to a position that `get_state` returned.

        Raises:
          ValueError: if it is the state of another kind of data set.
        """
        self._position = read_position(state)
        self._reader: Iterator[dict[str, np.ndarray]] | None = None

    def shard(self, index: int, count: int) -> "DetectionBatches":
        """Returns part `index` of `count` of every batch; see `Dataset.shard`.

        Raises:
          ValueError: if there is no such part.
          ConfigError: if `count` does not divide the batch.
        """
        part = copy.copy(self)
        part._rows = shard_rows(self._rows, index, count, noun="images")
        part.set_state(self.get_state())
        return part

    def in_order(self) -> Iterator[tuple[Batch, int]]:
        """Yields every image once, in order, with the number of images in each batch.

        Behind these the last batch is padded with black images without objects.
        """
        for start in range(0, self.num_examples, self.batch_size):
            stop = min(start + self.batch_size, self.num_examples)
            raw = self._read(np.arange(start, stop))
            missing = self.batch_size - (stop - start)
            pad = lambda x, n=missing: np.pad(x, [(0, n)] + [(0, 0)] * (x.ndim - 1))
            yield _normalize(jax.tree.map(pad, raw)), stop - start

    def _read_from(self, position: int) -> Iterator[dict[str, np.ndarray]]:
        if not self._examples.reads_files:
            return map(self._raw_batch, range(position, _ENDLESS))
        grain = import_extra("grain", extra="detection")
        batches = grain.MapDataset.range(position, _ENDLESS).map(self._raw_batch)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return iter(batches.to_iter_dataset(options))

    def _raw_batch(self, number: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(int(number), self.num_batches)
        first, num_rows = self._rows
        start = place * self.batch_size + first
        return self._read(self._order(epoch)[start : start + num_rows])

    @functools.cached_property
    def _order(self) -> Any:
        """`epoch -> order`, of which the last two are kept."""

        def order(epoch: int) -> np.ndarray:
            rng = np.random.default_rng((self._seed, epoch))
            return rng.permutation(self.num_examples)

        return functools.lru_cache(maxsize=2)(order)

    def _read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        objects = {name: values[indices] for name, values in self._objects.items()}
        return {"image": self._examples.read(indices), **objects}


def pack(examples: Examples, max_objects: int) -> dict[str, np.ndarray]:
    """Returns `boxes` (N, M, 4), `labels` (N, M) and `mask` (N, M) of N images."""
    shape = len(examples.annotations), max_objects
    boxes = np.zeros((*shape, 4), np.float32)
    labels, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, annotation in enumerate(examples.annotations):
        own_boxes, own_labels = annotation.trained_boxes()
        num = len(own_boxes)
        boxes[row, :num], labels[row, :num] = own_boxes, own_labels
        mask[row, :num] = True
    return {"boxes": boxes, "labels": labels, "mask": mask}


def count_objects(*splits: Examples) -> int:
    """Returns the most objects that training sees in an image; at least 1."""
    counts = [len(x.trained_boxes()[0]) for s in splits for x in s.annotations]
    return max(1, *counts)


def normalize_images(images: jax.Array) -> jax.Array:
    """Returns pixels (..., C) from 0 to 1 as a network takes them; see above."""
    if images.shape[-1] == 1:
        return images
    mean, deviation = map(jnp.asarray, (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (images - mean) / deviation


@jax.jit
def _normalize(raw: Any) -> Batch:
    """Returns a batch of pixels from 0 to 255 as the network takes it."""
    pixels = raw["image"].astype(jnp.float32) / 255
    return {**raw, "image": normalize_images(pixels)}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _prepare(
    raw: Any,
    key: jax.Array,
    number: jax.Array,
    augmentation: Augmentation,
    shape: tuple[int, int, int],
) -> Batch:
    """Augments and normalizes some rows of a batch; see `_take` of `on_device`."""
    if not any(augmentation):
        return _normalize(raw)
    batch_size, first_row, num_rows = shape
    keys = jax.random.split(jax.random.fold_in(key, number), batch_size)
    keys = keys[first_row : first_row + num_rows]
    pixels = raw["image"].astype(jnp.float32) / 255
    samples = Sample(pixels, raw["boxes"], raw["mask"])
    samples = jax.vmap(lambda k, s: augment(k, s, augmentation))(keys, samples)
    image = normalize_images(samples.image)
    return {**raw, "image": image, "boxes": samples.boxes, "mask": samples.mask}
