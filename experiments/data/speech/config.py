"""The flags of an experiment on speech: which corpus, and what of it."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.data.speech.mandarin_config import MandarinConfig
from experiments.harness.config import BaseConfig, require, require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.flags import did_you_mean, require_directory, require_file

if TYPE_CHECKING:
    from experiments.data.speech.corpus import Corpus

Unit = Literal["characters", "pinyin", "pinyin-tones"]
DATASETS = ("mandarin", "aishell", "librispeech")
TFDS = "tfds:"
# Flags that say how the data are read, and not what they are.
NOT_COMPARED = ("manifest", "num_workers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechConfig(BaseConfig):
    """Settings of an experiment on speech."""

    dataset: str = "mandarin"
    """mandarin, synthesised here by espeak-ng; aishell or librispeech, from their own
    folders in --data-dir; tfds:NAME, a speech data set of tensorflow-datasets."""

    mandarin: MandarinConfig = dataclasses.field(default_factory=MandarinConfig)
    """What is synthesised."""

    data_dir: Path | None = None
    """Directory of aishell, librispeech or tfds:NAME."""

    manifest: Path | None = None
    """Your own recordings instead of --dataset: a file of JSON lines such as
    {"audio": "clips/1.wav", "text": "ni hao"}, WAV or FLAC at any rate."""

    unit: Unit = "characters"
    """What the texts of aishell are made of."""

    min_duration_s: float = 0.1
    """Utterances that are shorter are left out, and counted."""

    max_duration_s: float = 16.0
    """Utterances that are longer are left out, and counted."""

    skip_bad: bool = False
    """Leave out recordings that cannot be read, and count them, instead of stopping.
    Each is then read once before the training."""

    num_mels: int = 40
    """Mel bands of a frame of 10 ms."""

    spec_augment: bool = False
    """Mask some of the times and frequencies of training utterances (SpecAugment)."""

    num_buckets: int = 2
    """Groups of utterances of similar length; each has batches of its own shape."""

    sorta_grad: bool = False
    """Go from short to long utterances in the first epoch (SortaGrad)."""

    num_workers: int = 0
    """Processes that read ahead; 0 for two threads, enough for the synthesised data."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        super().__post_init__()
        require_positive(self, "max_duration_s", "num_mels", "num_buckets")
        require(self.num_workers >= 0, "--num-workers", "0 or more", self)
        require(
            0 <= self.min_duration_s < self.max_duration_s,
            "--min-duration-s",
            f"from 0 to less than --max-duration-s {self.max_duration_s:g}",
            self,
        )
        if self.dataset not in DATASETS and not self.dataset.startswith(TFDS):
            raise ConfigError(
                f"--dataset must be one of {', '.join(DATASETS)}, {TFDS}NAME, "
                f"got {self.dataset!r}.{did_you_mean(self.dataset, DATASETS)}"
            )
        if self.needs_data_dir() and self.data_dir is None:
            raise ConfigError(
                f"--dataset {self.dataset} needs --data-dir, the folder that holds it."
            )

    def check_paths(self, experiment: str) -> None:
        """Checks --manifest and --data-dir too; see `BaseConfig.check_paths`."""
        super().check_paths(experiment)
        if self.manifest is not None:
            require_file("--manifest", self.manifest)
        if self.needs_data_dir() and self.data_dir is not None:
            require_directory("--data-dir", self.data_dir)

    def needs_data_dir(self) -> bool:
        """Whether the corpus is read from --data-dir."""
        return self.manifest is None and self.dataset in ("aishell", "librispeech")

    def comparable(self) -> dict[str, Any]:
        """Returns the settings to compare, without those that change no number."""
        values = super().comparable()
        return {k: v for k, v in values.items() if k not in NOT_COMPARED}

    def load_corpus(self) -> "Corpus":
        """Returns the corpus without what is too short, too long or unreadable.

        Raises:
          DataError: if it is unavailable or damaged, or if a split is empty.
        """
        from experiments.data.speech.load import load_corpus

        return load_corpus(self)
