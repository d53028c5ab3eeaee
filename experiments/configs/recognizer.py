"""The flags of a recognizer: its network, where its weights are from, its decoder."""

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.data.speech.config import SpeechConfig
from experiments.harness.config import require, require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.flags import require_file

if TYPE_CHECKING:
    from experiments.data.speech.vocabulary import Vocabulary
    from experiments.models.recognition import Decoder
    from experiments.models.speech.model import SpeechModel

Encoder = Literal["bigru", "bilstm", "gru_lookahead", "conformer"]
# The settings that the weights of a network belong to.
NETWORK = (
    "encoder",
    "num_channels",
    "num_units",
    "num_layers",
    "subsampling",
    "num_mels",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecognizerConfig(SpeechConfig):
    """Settings of a network that recognizes speech."""

    encoder: Encoder = "bigru"
    """bigru or bilstm; gru_lookahead, forward in time with a lookahead convolution as
    in the paper; or conformer."""

    num_channels: int = 8
    """Channels of the two convolutions."""

    num_units: int = 96
    """Units of each direction of a recurrent layer, or width of a Conformer block."""

    num_layers: int = 2
    """Layers of the encoder."""

    subsampling: Literal[2, 4] = 2
    """Frames per output: 2 or 4."""

    beam_width: int = 0
    """Decode by prefix beam search of this width; 0 takes the most probable path."""

    listen: Path | None = None
    """Write a few utterances, as WAV with a picture each, to this directory, and train
    nothing."""

    transcribe: tuple[Path, ...] = ()
    """Print what the network trained in --workdir hears in these recordings, WAV or
    FLAC at any rate, and train nothing. --policy and --beam-width choose."""

    init_from: Path | None = None
    """Start from the newest weights of another run: its directory, or that of one of
    its policies. The network is that run's; where the texts have other symbols, its
    output layer is new."""

    trainable: str | None = None
    """Train only the parameters in whose path, such as params/classes/kernel, this
    regular expression is found; params/classes is the output layer. BatchNorm's
    statistics follow the data all the same."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        super().__post_init__()
        require_positive(self, "num_channels", "num_units", "num_layers")
        require(self.beam_width >= 0, "--beam-width", "0 or more", self)
        if self.transcribe:
            self._check_transcribe()
        if self.trainable is not None:
            self._check_trainable(self.trainable)

    def check_paths(self, experiment: str) -> None:
        """Checks --transcribe and --init-from too; see `BaseConfig.check_paths`.

        The settings of a run that starts from another one's weights are compared later,
        when its network is known.
        """
        from experiments.harness.workdir import check_is_run

        if self.transcribe and self.workdir is not None:
            check_is_run(self.workdir)
            for recording in self.transcribe:
                require_file("--transcribe", recording)
        elif self.init_from is not None:
            is_policy = os.path.isfile(
                self.init_from.expanduser().parent / "config.json"
            )
            check_is_run(self.init_from.parent if is_policy else self.init_from)
        elif self.listen is None:
            super().check_paths(experiment)

    def comparable(self) -> dict[str, Any]:
        """Returns the settings to compare, without what changes no number."""
        values = super().comparable()
        return {k: v for k, v in values.items() if k not in ("listen", "transcribe")}

    def make_network(self, vocabulary: "Vocabulary") -> "SpeechModel":
        """Returns the network for a vocabulary."""
        from experiments.models.speech.model import SpeechModel

        return SpeechModel(
            num_classes=vocabulary.size,
            encoder=self.encoder,
            num_channels=self.num_channels,
            num_units=self.num_units,
            num_layers=self.num_layers,
            subsampling=self.subsampling,
        )

    def num_outputs(self, num_frames: int) -> int:
        """Returns how many outputs the network has for a number of frames."""
        return -(-num_frames // self.subsampling)

    def make_decoder(self) -> "Decoder | None":
        """Returns the beam search, or None for the most probable path."""
        if not self.beam_width:
            return None
        from experiments.models.speech.decoding import beam_search

        return lambda log_probabilities, vocabulary: vocabulary.decode(
            beam_search(log_probabilities, self.beam_width)
        )

    def _check_transcribe(self) -> None:
        if self.workdir is None:
            raise ConfigError("--transcribe needs --workdir, a run that has trained.")
        for name in ("resume", "listen", "init_from", "trainable"):
            if getattr(self, name):
                raise ConfigError(
                    "--transcribe trains and writes nothing; leave "
                    f"--{name.replace('_', '-')} out."
                )

    def _check_trainable(self, pattern: str) -> None:
        if self.init_from is None:
            raise ConfigError(
                "--trainable needs --init-from: without another run's weights, what is "
                "not trained stays random."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"--trainable {pattern!r} is no regular expression: {error}."
            ) from error
