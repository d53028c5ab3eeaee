"""The flags of the benchmark of step times."""

import dataclasses
import re
from pathlib import Path

from experiments.configs.attention import check_attention
from experiments.harness.config import require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.flags import parse_names

WORKLOADS = (
    "mlp",
    "convnet",
    "transformer_block",
    "transformer",
    "bigru",
    "speech",
    "speech_large",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to time."""

    workloads: str = "mlp"
    """Comma-separated models: mlp, convnet, transformer_block, transformer, bigru,
    speech, speech_large."""

    baselines: str = ""
    """Regular expression; times the baselines whose name it matches and the baselines
    that they are compared with. Empty for all."""

    attention: str = "auto"
    """Attention of transformers in half: "xla" for XLA's operations, "cudnn" for
    cuDNN's kernel, "auto" for "cudnn" on an NVIDIA GPU that supports it and "xla"
    elsewhere. In float32, which the kernel refuses, it is XLA's operations."""

    batch_size: int | None = None
    """Examples per step; by default each model has its own for a CPU and for a GPU."""

    num_units: int = 4096
    """Units in each of the two hidden layers of the MLP."""

    num_rounds: int = 11
    """How often each baseline is timed."""

    seed: int = 0
    """Seed for parameters, data and the order within rounds."""

    max_minutes: float | None = None
    """Stop starting new baselines after this many minutes of compiling per model."""

    output_dir: Path | None = None
    """Directory of the result files; experiments/results by default."""

    def __post_init__(self):
        require_positive(self, "num_units", "num_rounds")
        for name in ("batch_size", "max_minutes"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        self.workload_names()
        check_attention(self.attention)
        try:
            re.compile(self.baselines)
        except re.error as error:
            raise ConfigError(
                f"--baselines is not a regular expression: {error}."
            ) from error

    def workload_names(self) -> list[str]:
        """Returns the models to time.

        Raises:
          ConfigError: if one of them is unknown.
        """
        return parse_names("--workloads", self.workloads, WORKLOADS)
