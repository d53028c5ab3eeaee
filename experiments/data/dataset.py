"""What the training loop asks of a data set."""

from collections.abc import Iterator
from typing import Any, Protocol, Self, runtime_checkable


@runtime_checkable
class Dataset(Protocol):
    """An endless iterator of training batches that can be resumed and shared out.

    A batch is any pytree of arrays, in NumPy or on the device. Its structure and dtypes
    are those of every other batch, and so are its shapes, or they are among a few, for
    each of which the train step is compiled once; a last batch with fewer examples is
    padded, and says so by a mask or by lengths.

    The batches are a function of the position alone: a data set whose state is set to
    one that an equal data set gave continues with the same batches, bit for bit, in
    another process too.
    """

    def __iter__(self) -> Iterator[Any]:
        """Returns itself."""
        ...

    def __next__(self) -> Any:
        """Returns the next batch."""
        ...

    def get_state(self) -> Any:
        """Returns the position behind the last batch, as JSON values.

        A checkpoint keeps it beside the `TrainState`. All shards of a data set that
        gave the same number of batches have the same state.
        """
        ...

    def set_state(self, state: Any) -> None:
        """Moves to a position that `get_state` returned.

        Raises:
          ValueError: if it is the state of another kind of data set.
        """
        ...

    def shard(self, index: int, count: int) -> Self:
        """Returns the part of every batch that one of several processes trains on.

        The parts are disjoint blocks of rows. Concatenated in the order of `index`,
        they are the batch that one process alone would see. The shard begins at the
        current position, and iterates on its own.

        Args:
          index: index of the process, 0 to `count - 1`.
          count: how many processes share each batch.

        Raises:
          ValueError: if there is no such part.
          ConfigError: if the batch cannot be divided into `count` equal parts.
        """
        ...


def check_shard(index: int, count: int) -> None:
    """Raises ValueError unless there is a part `index` of `count`."""
    if not 0 <= index < count:
        raise ValueError(
            f"expected an index from 0 to count - 1, got shard({index}, {count}); "
            "jax.process_index() and jax.process_count() are such a pair."
        )
