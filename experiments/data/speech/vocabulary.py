"""The symbols of a corpus, and their numbers under CTC."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.harness.errors import ConfigError, DataError

BLANK = 0
"""CTC's blank, which stands for no symbol."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Symbols, numbered from 1; 0 is CTC's blank.

    >>> vocabulary = Vocabulary.of(["nihao", "ni"])
    >>> vocabulary.symbols
    ('a', 'h', 'i', 'n', 'o')
    >>> vocabulary.decode(vocabulary.encode("hao"))
    'hao'

    Attributes:
      symbols: single characters, each once.
    """

    symbols: tuple[str, ...]

    def __post_init__(self):
        """Checks the symbols.

        Raises:
          DataError: if there is none, one is no single character, or one comes twice.
        """
        strange = [s for s in self.symbols if not isinstance(s, str) or len(s) != 1]
        if strange or not self.symbols or len(set(self.symbols)) < len(self.symbols):
            raise DataError(
                "a vocabulary must be different single characters, at least one, got "
                f"{strange or self.symbols!r}."
            )

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Vocabulary":
        """Returns the characters of all texts, sorted.

        Raises:
          DataError: if the texts have no characters.
        """
        return cls(tuple(sorted(set().union(*texts))))

    @classmethod
    def from_json(cls, value: Any) -> "Vocabulary":
        """Returns what `to_json` was called on.

        Raises:
          DataError: if the value is no vocabulary.
        """
        symbols = value.get("symbols") if isinstance(value, Mapping) else None
        if not isinstance(symbols, list):
            raise DataError(f"expected a vocabulary as JSON, got {str(value)[:80]!r}.")
        return cls(tuple(symbols))

    def to_json(self) -> dict[str, list[str]]:
        """Returns plain values for JSON."""
        return {"symbols": list(self.symbols)}

    @property
    def size(self) -> int:
        """How many classes a model has: the symbols and the blank."""
        return len(self.symbols) + 1

    def encode(self, text: str) -> np.ndarray:
        """Returns the number of each character, int32 (len(text),).

        Raises:
          ConfigError: if a character is outside; lists all that are.
        """
        outside = sorted(set(text) - self._numbers.keys())
        if outside:
            raise ConfigError(
                f"{text[:60]!r} has characters outside the vocabulary: "
                f"{' '.join(map(repr, outside))}; expected "
                f"{_abbreviated(self.symbols)}. Change the text, or train with a "
                "vocabulary that has them."
            )
        return np.array([self._numbers[character] for character in text], np.int32)

    def decode(self, numbers: Sequence[int] | np.ndarray) -> str:
        """Returns the text of symbols' numbers; blanks are left out.

        Raises:
          DataError: if a number is outside.
        """
        numbers = [int(number) for number in numbers]
        outside = [n for n in numbers if not 0 <= n < self.size]
        if outside:
            raise DataError(
                f"expected numbers from 0 to {self.size - 1}, got {outside[:10]}."
            )
        return "".join(self.symbols[n - 1] for n in numbers if n != BLANK)

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.symbols, 1)}


def collapse(path: Iterable[int]) -> list[int]:
    """Returns what a CTC path stands for: repeats merged, then blanks dropped.

    Args:
      path: a class per frame, for instance the most probable one.

    >>> collapse([0, 3, 3, 0, 3, 5, 5])
    [3, 3, 5]
    """
    return [int(n) for n, _ in itertools.groupby(path) if n != BLANK]


def _abbreviated(symbols: Sequence[str], most: int = 60) -> str:
    text = "".join(symbols[:most])
    return f"{text!r} ..." if len(symbols) > most else repr(text)
