"""The flags of the benchmark of gradient errors."""

import dataclasses
from pathlib import Path

from experiments.configs.memory import REAL_MODELS
from experiments.harness.config import require_positive
from experiments.harness.flags import parse_names

ALL_MODELS = (
    *REAL_MODELS,
    "gpt2_24_layers",
    "gpt2_24_layers_scan_remat",
    "resnet_53_convolutions",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure, and how often."""

    workloads: str = "small"
    """Models: small, real, or comma-separated names of real ones, whose rows replace
    those in the result file; or float8: small ones in float8."""

    num_seeds: int = 3
    """Errors are averaged over this many seeds for parameters and inputs: 0, 1, …"""

    num_rounds: int = 21
    """How often each gradient is timed."""

    output: Path | None = None
    """Result file; a name in experiments/results by default."""

    def __post_init__(self):
        require_positive(self, "num_seeds", "num_rounds")
        self.real_names()

    def real_names(self) -> list[str]:
        """Returns the names of the real models to measure; none for small ones."""
        if self.workloads in ("small", "float8"):
            return []
        if self.workloads == "real":
            return list(ALL_MODELS)
        return parse_names("--workloads", self.workloads, ALL_MODELS)
