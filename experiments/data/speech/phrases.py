"""What is said in the synthetic Mandarin corpus, and who says it: a seeded plan."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data.speech import pinyin
from experiments.data.speech.espeak import Line
from experiments.data.speech.mandarin_config import MIN_HELD_OUT_SYLLABLES
from experiments.harness.errors import ConfigError

MIN_PITCH, MAX_PITCH = 25, 75

MAX_HELD_OUT_SHARE = 0.05
_MAX_DRAWS_PER_PHRASE = 50
_ALL_SYLLABLES = "|".join(pinyin.SYLLABLES)


class Planned(NamedTuple):
    """An utterance before it is said.

    Attributes:
      text: what is to be recognised.
      line: what espeak-ng says, with tones in every case.
    """

    text: str
    line: Line


class Phrases:
    """Draws phrases of random syllables.

    Attributes:
      syllables: the syllables they are made of, without tones.
    """

    def __init__(self, rng: np.random.Generator, num_syllables: int, tones: bool):
        """Chooses the syllables.

        Args:
          rng: where all random numbers come from.
          num_syllables: how many of the 402 syllables there are.
          tones: whether texts have the tone's digit after each syllable.
        """
        chosen = rng.permutation(len(pinyin.SYLLABLES))[:num_syllables]
        self.syllables = tuple(pinyin.SYLLABLES[i] for i in np.sort(chosen))
        self._rng = rng
        self._tones = tones

    def held_out(self, num: int, min_length: int, max_length: int) -> list[list[str]]:
        """Returns different phrases, each a list of syllables.

        They are so long that they are few among all phrases of their length, since no
        training utterance may have one of them in it: two syllables at least, and more
        where there are few different syllables. None is written as one syllable is, as
        "xi an" would be: no training utterance might then have that syllable.

        Raises:
          ConfigError: if there are not so many different phrases.
        """
        shortest = max(min_length, MIN_HELD_OUT_SYLLABLES)
        enough = num / MAX_HELD_OUT_SHARE
        while shortest < max_length and len(self.syllables) ** shortest < enough:
            shortest += 1
        found: dict[str, list[str]] = {}
        for _ in range(_MAX_DRAWS_PER_PHRASE * num):
            if len(found) == num:
                break
            phrase = self._draw(shortest, max_length)
            text = "".join(phrase)
            if text not in _ALL_SYLLABLES:
                found.setdefault(text, phrase)
        if len(found) < num:
            raise self._too_few(num, f"{len(found)} different phrases")
        return list(found.values())

    def without(
        self, held_out: Collection[str], num: int, min_length: int, max_length: int
    ) -> list[list[str]]:
        """Returns phrases in whose letters none of the held-out texts stands.

        Raises:
          ConfigError: if nearly every phrase has one of them in it.
        """
        held_out = set(held_out)
        lengths = {len(text) for text in held_out}
        phrases = []
        for _ in range(_MAX_DRAWS_PER_PHRASE * num):
            if len(phrases) == num:
                break
            phrase = self._draw(min_length, max_length)
            if held_out.isdisjoint(_parts("".join(phrase), lengths)):
                phrases.append(phrase)
        if len(phrases) < num:
            raise self._too_few(num, f"{len(phrases)} that avoid the test's phrases")
        return phrases

    def plan(
        self, phrases: Sequence[Sequence[str]], voices: Sequence[str], rates_wpm: range
    ) -> list[Planned]:
        """Gives each phrase tones, a voice, a rate and a pitch."""
        planned = []
        for phrase in phrases:
            tones = self._rng.choice(pinyin.TONES, len(phrase))
            toned = [f"{s}{tone}" for s, tone in zip(phrase, tones, strict=True)]
            line = Line(
                voice=voices[int(self._rng.integers(len(voices)))],
                text=" ".join(toned),
                rate_wpm=int(self._rng.integers(rates_wpm.start, rates_wpm.stop)),
                pitch=int(self._rng.integers(MIN_PITCH, MAX_PITCH + 1)),
            )
            planned.append(Planned("".join(toned if self._tones else phrase), line))
        return planned

    def _draw(self, min_length: int, max_length: int) -> list[str]:
        length = self._rng.integers(min_length, max_length + 1)
        indices = self._rng.integers(len(self.syllables), size=length)
        return [self.syllables[i] for i in indices]

    def _too_few(self, num: int, found: str) -> ConfigError:
        return ConfigError(
            f"{num} phrases are asked for, and {len(self.syllables)} syllables give "
            f"{found}; ask for more syllables, longer phrases, or fewer utterances."
        )


def _parts(text: str, lengths: Collection[int]) -> set[str]:
    """Returns the parts of a text that have one of these lengths."""
    return {
        text[start : start + length]
        for length in lengths
        for start in range(len(text) - length + 1)
    }
