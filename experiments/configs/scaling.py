"""The flags of the benchmark of scaling."""

import dataclasses
from pathlib import Path

from experiments.configs.attention import check_attention
from experiments.configs.memory import DEVICES as ALL_DEVICES
from experiments.harness.config import require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.flags import did_you_mean, parse_names

MODELS = ("gpt_1.3b", "gpt_7b")
DEVICES = tuple(name for name in ALL_DEVICES if name != "present")
NUM_PER_NODE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The models to compile, and the GPUs, which need not be there."""

    device: str = "h100"
    """Kind of GPU: a100, b200, h100, h200, v100."""

    models: str = ",".join(MODELS)
    """Comma-separated models: gpt_1.3b, gpt_7b."""

    num_gpus: tuple[int, ...] = (1, 8, 64, 512)
    """Numbers of GPUs: fewer than 8, or whole nodes of 8."""

    batch_size_per_gpu: int = 8
    """Sequences of 1024 tokens on each GPU."""

    attention: str = "auto"
    """Attention in half: "xla" for XLA's operations, "cudnn" for cuDNN's kernel, "auto"
    for "cudnn" on a GPU that supports it. In float32 it is XLA's operations."""

    output: Path | None = None
    """Result file; a plot goes beside it. A name in experiments/results by default."""

    def __post_init__(self):
        self.model_names()
        check_attention(self.attention)
        require_positive(self, "batch_size_per_gpu")
        if self.device not in DEVICES:
            raise ConfigError(
                f"--device must be one of {', '.join(DEVICES)}, got {self.device!r}."
                f"{did_you_mean(self.device, DEVICES)}"
            )
        is_whole = lambda n: 0 < n < NUM_PER_NODE or (n > 0 and n % NUM_PER_NODE == 0)
        if not self.num_gpus or not all(map(is_whole, self.num_gpus)):
            raise ConfigError(
                "--num-gpus must be from 1 to 7, or multiples of 8, one number or "
                f"several, got {self.num_gpus}."
            )

    def model_names(self) -> list[str]:
        """Returns the models to compile.

        Raises:
          ConfigError: if one of them is unknown.
        """
        return parse_names("--models", self.models, MODELS)
