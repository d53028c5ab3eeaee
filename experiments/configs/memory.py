"""The flags of the benchmark of memory."""

import dataclasses
from pathlib import Path

from experiments.configs.attention import check_attention
from experiments.harness.errors import ConfigError
from experiments.harness.flags import did_you_mean, parse_names

BATCH_SIZES = {
    "mlp": (512, 2048, 8192, 32768),
    "convnet": (256, 1024, 4096, 16384),
    "transformer_block": (1, 4, 16, 64),
    "transformer": (1, 4, 16, 64),
    "bigru": (16, 64, 256, 1024),
    "speech_large": (4, 16, 64, 256),
}
ALL_REAL_MODELS = "real"
REAL_MODELS = (
    "resnet50",
    "unet",
    "vit_b16",
    "gpt2",
    "gpt2_tanh",
    "gpt2_scan",
    "gpt2_scan_remat",
    "llama",
    "llama_sdpa",
    "deep_speech2",
    "moe_dense",
    "moe_ragged",
    "ssd300",
)
DEVICES = ("present", "a100", "b200", "h100", "h200", "v100")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The models to compile, and the device."""

    device: str = "h100"
    """GPU, which need not be in this machine: a100, b200, h100, h200, v100; or
    "present" for the device of this machine."""

    workloads: str = ",".join(BATCH_SIZES)
    """Comma-separated models: mlp, convnet, transformer_block, transformer, bigru,
    speech_large; or real models: resnet50, unet, vit_b16, gpt2, gpt2_tanh, gpt2_scan,
    gpt2_scan_remat, llama, llama_sdpa, deep_speech2, moe_dense, moe_ragged, ssd300;
    "real" for all of these."""

    float8: bool = False
    """Compare float8 with bfloat16, in a table of its own; models of both kinds."""

    attention: str = "auto"
    """Attention of transformers in half: "xla" for XLA's operations, "cudnn" for
    cuDNN's kernel, "auto" for "cudnn" on an NVIDIA GPU that supports it and "xla"
    elsewhere. In float32, which the kernel refuses, it is XLA's operations."""

    output: Path | None = None
    """Result file; a plot goes beside it. A name in experiments/results by default."""

    def __post_init__(self):
        self.workload_names()
        check_attention(self.attention)
        if self.device not in DEVICES:
            raise ConfigError(
                f"--device must be one of {', '.join(DEVICES)}, got {self.device!r}."
                f"{did_you_mean(self.device, DEVICES)}"
            )

    def workload_names(self) -> list[str]:
        """Returns the models to compile, all of one table.

        Raises:
          ConfigError: if one of them is unknown, or if real models are among others.
        """
        if self.workloads.strip() == ALL_REAL_MODELS:
            return list(REAL_MODELS)
        known = (*BATCH_SIZES, *REAL_MODELS)
        names = parse_names("--workloads", self.workloads, known)
        real = [name for name in names if name in REAL_MODELS]
        if not self.float8 and real and len(real) < len(names):
            raise ConfigError(
                f"--workloads must be real models, such as {real[0]}, or others, since "
                f"these go to different tables; got {self.workloads!r}."
            )
        return names
