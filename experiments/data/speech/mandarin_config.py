"""The settings of the synthesised Mandarin corpus."""

import dataclasses

from experiments.data.speech import pinyin
from experiments.harness.errors import ConfigError

MIN_HELD_OUT_SYLLABLES = 2
"""A single syllable stands in every training utterance that has it."""

_MIN_RATE_WPM, _MAX_RATE_WPM = 80, 450  # espeak-ng's own limits


@dataclasses.dataclass(frozen=True, kw_only=True)
class MandarinConfig:
    """Settings that determine every sample of the corpus."""

    seed: int = 0
    """Seed of phrases, voices, rates, pitches and noise."""

    num_train: int = 10_000
    """Utterances for training."""

    num_val: int = 500
    """Utterances for validation."""

    num_test: int = 500
    """Utterances for the test."""

    num_syllables: int = len(pinyin.SYLLABLES)
    """Different syllables, chosen at random from the 402; fewer are easier."""

    min_syllables: int = 1
    """Syllables of the shortest training phrase; those held out have 2 at least, and
    more where there are few different syllables."""

    max_syllables: int = 5
    """Syllables of the longest phrase."""

    tones: bool = False
    """Whether the tones are to be recognised: harder."""

    min_snr_db: float = 15.0
    """Signal-to-noise ratio of the noisiest utterance."""

    max_snr_db: float = 35.0
    """Signal-to-noise ratio of the cleanest utterance."""

    min_rate_wpm: int = 130
    """Slowest speech, in espeak-ng's words per minute."""

    max_rate_wpm: int = 240
    """Fastest speech, in espeak-ng's words per minute."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        most = len(pinyin.SYLLABLES)
        longest = max(MIN_HELD_OUT_SYLLABLES, self.min_syllables)
        rates = (
            f"--mandarin.min-rate-wpm or more, from {_MIN_RATE_WPM} to {_MAX_RATE_WPM}"
        )
        slow, fast = self.min_rate_wpm, self.max_rate_wpm
        checks = {
            "seed": (self.seed >= 0, "0 or more"),
            "num_train": (self.num_train > 0, "1 or more"),
            "num_val": (self.num_val > 0, "1 or more"),
            "num_test": (self.num_test > 0, "1 or more"),
            "num_syllables": (0 < self.num_syllables <= most, f"from 1 to {most}"),
            "min_syllables": (self.min_syllables > 0, "1 or more"),
            "max_syllables": (self.max_syllables >= longest, f"{longest} or more"),
            "max_snr_db": (
                -30 <= self.min_snr_db <= self.max_snr_db <= 100,
                "--mandarin.min-snr-db or more, both from -30 to 100",
            ),
            "max_rate_wpm": (_MIN_RATE_WPM <= slow <= fast <= _MAX_RATE_WPM, rates),
        }
        for name, (is_valid, expected) in checks.items():
            if not is_valid:
                value = getattr(self, name)
                flag = f"--mandarin.{name.replace('_', '-')}"
                raise ConfigError(f"{flag} must be {expected}, got {value!r}.")
