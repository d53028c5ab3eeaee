"""What the training loop asks of a data set."""

from collections.abc import Iterator
from typing import Any, Protocol, Self, runtime_checkable

from experiments.harness.errors import ConfigError


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


def read_position(state: Any) -> int:
    """Returns the number of batches in a state `{"num_batches": ...}`.

    Raises:
      ValueError: if it is the state of another kind of data set.
    """
    num_batches = state.get("num_batches") if isinstance(state, dict) else None
    if not isinstance(num_batches, int) or num_batches < 0:
        raise ValueError(f"expected {{'num_batches': 0 or more}}, got {state!r}.")
    return num_batches


def shard_rows(
    rows: tuple[int, int], index: int, count: int, *, noun: str = "examples"
) -> tuple[int, int]:
    """Returns the first row, and the number of rows, of part `index` of `count`.

    Args:
      rows: the same of the whole.
      index: index of the process.
      count: how many processes share the rows.
      noun: what a row is, for the error.

    Raises:
      ValueError: if there is no such part.
      ConfigError: if `count` does not divide the rows.
    """
    check_shard(index, count)
    first_row, num_rows = rows
    if num_rows % count:
        raise ConfigError(
            f"{count} processes cannot share a batch of {num_rows} {noun} equally; "
            f"choose a multiple of {count} for --batch-size."
        )
    num_rows //= count
    return first_row + index * num_rows, num_rows
