"""What the speech experiment asks of a corpus: utterances by split."""

from typing import NamedTuple, Protocol

import numpy as np

SAMPLE_RATE_HZ = 16_000


class Utterance(NamedTuple):
    """What is known of an utterance without reading its audio.

    Attributes:
      id: its name in the corpus, which no other utterance has.
      text: what is said, in the corpus's own characters.
      speaker: who says it; "" where that is not known.
      duration_s: seconds of audio.
    """

    id: str
    text: str
    speaker: str
    duration_s: float


class Utterances(Protocol):
    """A split of a corpus: a sequence of utterances, in a fixed order."""

    def __len__(self) -> int:
        """Returns how many utterances there are."""
        ...

    def __getitem__(self, index: int) -> Utterance:
        """Returns one utterance, without its audio; fast."""
        ...

    def samples(self, index: int) -> np.ndarray:
        """Returns the audio of an utterance, (N,) float32 in [-1, 1] at 16 kHz, mono.

        Safe to call from several threads and worker processes.

        Raises:
          AudioError: if the audio cannot be read; names the file and the reason.
        """
        ...


class Corpus(NamedTuple):
    """A speech corpus.

    Attributes:
      name: its name in results and tables.
      train: what to train on.
      val: what is evaluated after every epoch.
      test: what is evaluated at the end; speakers that are not in `train`, where the
        corpus says who speaks.
      unit: what its texts are made of: "pinyin letters", "characters", ...
      has_words: whether its texts have words between spaces, so that a word error rate
        means something.
    """

    name: str
    train: Utterances
    val: Utterances
    test: Utterances
    unit: str
    has_words: bool = False
