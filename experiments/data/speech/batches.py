"""Padded batches of utterances of similar length, from Grain."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data.dataset import read_position, shard_rows
from experiments.harness.errors import DataError

Batch = dict[str, np.ndarray]
_FRAME_MULTIPLE = 8  # lengths of batches, in frames
_ENDLESS = 2**31 - 1  # batches; Grain wants a number


class Example(NamedTuple):
    """What is known of an utterance before its audio is read.

    Attributes:
      num_frames: frames of its features; an upper bound.
      labels: its labels (U,) int32, none of which is 0, the blank.
    """

    num_frames: int
    labels: np.ndarray


class Bucket(NamedTuple):
    """Utterances of similar length, whose batches have one shape.

    Attributes:
      indices: the utterances, int (N,).
      num_frames: frames of a batch; the longest utterance, rounded up.
      num_labels: labels of a batch; those of the utterance that has most.
    """

    indices: np.ndarray
    num_frames: int
    num_labels: int


def make_buckets(examples: Sequence[Example], num_buckets: int) -> list[Bucket]:
    """Sorts utterances by length and divides them into groups of about equal size.

    Raises:
      DataError: without utterances.
    """
    if not examples:
        raise DataError("there is no utterance to make batches of.")
    lengths = np.array([x.num_frames for x in examples])
    order = np.argsort(lengths, kind="stable")
    groups = np.array_split(order, min(num_buckets, len(order)))
    return [
        Bucket(
            np.sort(group),
            -(-int(lengths[group].max()) // _FRAME_MULTIPLE) * _FRAME_MULTIPLE,
            max(1, *(len(examples[i].labels) for i in group)),
        )
        for group in groups
    ]


class SpeechBatches:
    """The endless batches of a split: a `Dataset`.

    B denotes the batch size, T frames, F frequencies, U labels. A batch holds
    `features` (B, T, F) float32, `num_frames` int32 (B,), `labels` int32 (B, U) and
    `num_labels` int32 (B,). T and U are one of a few pairs, a pair per bucket. Where a
    bucket does not fill its last batch of an epoch, rows with `num_frames` 0 do.

    Which utterances are in a batch, and how they are masked by SpecAugment, depends on
    the seed and on the number of the batch alone. Grain reads ahead of the training, in
    threads or in worker processes.

    Attributes:
      num_examples: utterances.
      num_batches: batches in an epoch.
      num_features: F.
      buckets: the groups that share a shape.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        features: Callable[[int, np.random.Generator | None], np.ndarray],
        *,
        num_features: int,
        batch_size: int,
        seed: int,
        num_buckets: int = 4,
        sort_first_epoch: bool = False,
        num_workers: int = 0,
    ):
        """Divides the utterances into buckets; reads nothing.

        Args:
          examples: the utterances.
          features: `(index, rng) -> (num_frames, F)`, float32; `rng` is for
            augmentation, None for none. With workers, something that pickle can take.
          num_features: F.
          batch_size: B.
          seed: determines the order of every epoch, and the augmentation.
          num_buckets: how many shapes of batches there are, at most.
          sort_first_epoch: whether the first epoch goes from short to long utterances
            ("SortaGrad", Deep Speech 2, arXiv:1512.02595, section 3.2).
          num_workers: processes that read ahead; 0 for two threads.
        """
        self.num_examples = len(examples)
        self.buckets = make_buckets(examples, num_buckets)
        self._examples = examples
        self._features = features
        self.num_features = num_features
        self._batch_size = batch_size
        self._seed = seed
        self._sort_first_epoch = sort_first_epoch
        self._num_workers = num_workers
        self._rows = (0, batch_size)
        self.num_batches = sum(-(-len(b.indices) // batch_size) for b in self.buckets)
        self.set_state({"num_batches": 0})

    def __iter__(self) -> Iterator[Batch]:
        """Returns itself."""
        return self

    def __next__(self) -> Batch:
        """Returns the next batch."""
        if self._reader is None:
            self._reader = self._read_from(self._position)
        batch = next(self._reader)
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
        self._reader: Iterator[Batch] | None = None

    def shard(self, index: int, count: int) -> "SpeechBatches":
        """Returns part `index` of `count` of every batch; see `Dataset.shard`.

        Raises:
          ValueError: if there is no such part.
          ConfigError: if `count` does not divide the batch.
        """
        part = copy.copy(self)
        part._rows = shard_rows(self._rows, index, count, noun="utterances")
        part.set_state(self.get_state())
        return part

    def plan(self, epoch: int) -> list[tuple[Bucket, np.ndarray]]:
        """Returns an epoch's batches in order: buckets, and the utterances of each."""
        rng = np.random.default_rng((self._seed, epoch))
        is_sorted = self._sort_first_epoch and epoch == 0
        batches = []
        for bucket in self.buckets:
            order = rng.permutation(bucket.indices)
            if is_sorted:
                order = sorted(order, key=lambda i: self._examples[i].num_frames)
            starts = range(0, len(order), self._batch_size)
            chunks = [np.asarray(order[s : s + self._batch_size]) for s in starts]
            batches += [(bucket, chunk) for chunk in chunks]
        if is_sorted:
            return batches
        return [batches[i] for i in rng.permutation(len(batches))]

    def in_order(self) -> Iterator[Batch]:
        """Yields every utterance once, from short to long, without augmentation."""
        for bucket in self.buckets:
            for start in range(0, len(bucket.indices), self._batch_size):
                indices = bucket.indices[start : start + self._batch_size]
                yield self._make_batch(bucket, indices, None)

    def _read_from(self, position: int) -> Iterator[Batch]:
        import grain

        batches = grain.MapDataset.range(position, _ENDLESS).map(self._batch)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        iterator = batches.to_iter_dataset(options)
        if self._num_workers:
            from absl import flags  # Grain's worker processes read its flags

            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self._num_workers)
            iterator = iterator.mp_prefetch(workers)
        return iter(iterator)

    def _batch(self, number: int) -> Batch:
        epoch, place = divmod(int(number), self.num_batches)
        bucket, indices = self._cached_plan(epoch)[place]
        return self._make_batch(bucket, indices, int(number))

    @functools.cached_property
    def _cached_plan(self) -> Callable[[int], list[tuple[Bucket, np.ndarray]]]:
        return functools.lru_cache(maxsize=2)(self.plan)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a worker process needs."""
        without = ("_reader", "_cached_plan")
        return {k: v for k, v in self.__dict__.items() if k not in without}

    def _make_batch(self, bucket: Bucket, indices: Any, number: int | None) -> Batch:
        """Reads the rows of a batch; `number` seeds the augmentation, None for none."""
        first, num_rows = self._rows
        shape = (num_rows, bucket.num_frames, self.num_features)
        features = np.zeros(shape, np.float32)
        labels = np.zeros((num_rows, bucket.num_labels), np.int32)
        num_frames, num_labels = np.zeros((2, num_rows), np.int32)
        for row, index in enumerate(indices[first : first + num_rows]):
            rng = None
            if number is not None:
                rng = np.random.default_rng((self._seed, number, first + row))
            x, label = self._features(int(index), rng), self._examples[index].labels
            _check_length(len(x), bucket.num_frames, int(index))
            features[row, : len(x)], num_frames[row] = x, len(x)
            labels[row, : len(label)], num_labels[row] = label, len(label)
        return {
            "features": features,
            "num_frames": num_frames,
            "labels": labels,
            "num_labels": num_labels,
        }


def _check_length(length: int, limit: int, index: int) -> None:
    if length > limit:
        raise DataError(
            f"utterance {index} has {length} frames, more than the {limit} of its "
            "batch: its audio is longer than its corpus says; load the corpus again."
        )
