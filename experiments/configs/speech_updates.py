"""The flags of the ablation of float32 master weights."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from experiments.configs import speech_ctc
from experiments.configs.speech_ctc import Optimizer
from experiments.data.speech.mandarin_config import MandarinConfig
from experiments.harness.config import Variant, require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.flags import parse_names

Setting = Literal["default", "small_updates"]


VARIANTS = {
    "float32": Variant("float32", "none"),
    "mixed_float16": Variant("mixed_float16", "dynamic"),
    "mixed_float16_unscaled": Variant("mixed_float16", "none"),
    "mixed_bfloat16": Variant("mixed_bfloat16", "none"),
    "float16_updates": Variant("float16", "dynamic"),
    "float16_stochastic": Variant("float16", "dynamic"),
    "float16_master": Variant("float16", "dynamic"),
}
# Factors of the learning rates and of the number of epochs.
SETTINGS: dict[Setting, tuple[float, int]] = {
    "default": (1.0, 1),
    "small_updates": (1 / 16, 4),
}
# Flags of `speech_ctc` that a variant decides.
DECIDED = ("policies", "policy", "loss_scale", "optimizer", "listen")


class Cell(NamedTuple):
    """One run: an optimizer, a variant, and a seed."""

    optimizer: Optimizer
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Returns the name of its directory."""
        return f"{self.optimizer}-{self.variant}-{self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(speech_ctc.Config):
    """Settings of the ablation; --policies and the like are decided by the variants."""

    EXTENSIBLE: ClassVar[tuple[str, ...]] = ()

    nesterov_variants: str = ",".join(VARIANTS)
    """Ways to train by SGD with Nesterov momentum, separated by commas; "" for none."""

    adam_variants: str = "float32,mixed_float16,mixed_bfloat16,float16_updates"
    """Ways to train by Adam, separated by commas; "" for none."""

    num_seeds: int = 3
    """Runs per way; their seeds begin with --seed, and are the same for all ways."""

    setting: Setting = "default"
    """default; or small_updates, in which float16 must lose updates that matter: a 16th
    of the learning rates, and 4 times the epochs."""

    learning_rate: float = 2e-3
    """Largest learning rate of Adam; it rises for a tenth of the steps, then falls."""

    nesterov_learning_rate: float = 1e-2
    """Largest learning rate of Nesterov momentum."""

    weight_scale: float = 1.0
    """What the initial kernels are multiplied by: larger weights lose more updates."""

    mandarin: MandarinConfig = dataclasses.field(
        default_factory=lambda: MandarinConfig(num_train=3200)
    )
    """What is synthesised."""

    num_epochs: int = 4
    """Passes over the training set, in the default setting."""

    num_buckets: int = 2
    """Groups of utterances of similar length; each compiles a train step of its own."""

    num_checkpoints: int = 1
    """Number of checkpoints to keep of a run. 0 writes none; a run that is stopped then
    begins anew."""

    output: Path | None = None
    """Result file; a plot goes beside it. A name in experiments/results by default."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work, or has no effect here.
        """
        super().__post_init__()
        require_positive(self, "num_seeds", "nesterov_learning_rate", "weight_scale")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in DECIDED:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is decided by the variants here; "
                    "choose them by --nesterov-variants and --adam-variants, or use "
                    "python -m experiments.speech_ctc."
                )
        if not self.cells():
            raise ConfigError(
                "--nesterov-variants and --adam-variants name nothing to train."
            )

    def comparable(self) -> dict[str, Any]:
        """Returns the settings that a resumed ablation shares: all but which runs."""
        more = ("nesterov_variants", "adam_variants", "num_seeds", "output")
        return {k: v for k, v in super().comparable().items() if k not in more}

    def variants(self) -> list[tuple[Optimizer, str]]:
        """Returns every optimizer with its variants.

        Raises:
          ConfigError: for a variant that does not exist.
        """
        flags: tuple[tuple[Optimizer, str], ...] = (
            ("nesterov", self.nesterov_variants),
            ("adam", self.adam_variants),
        )
        return [
            (optimizer, name)
            for optimizer, text in flags
            if text.strip()
            for name in dict.fromkeys(
                parse_names(f"--{optimizer}-variants", text, VARIANTS)
            )
        ]

    def cells(self) -> list[Cell]:
        """Returns the runs, all variants of the first seed first."""
        seeds = range(self.seed, self.seed + self.num_seeds)
        pairs = itertools.product(seeds, self.variants())
        return [Cell(optimizer, name, seed) for seed, (optimizer, name) in pairs]

    def run_config(self, cell: Cell) -> speech_ctc.Config:
        """Returns the settings of one run."""
        fields = dataclasses.fields(speech_ctc.Config)
        values = {field.name: getattr(self, field.name) for field in fields}
        rates = {"adam": self.learning_rate, "nesterov": self.nesterov_learning_rate}
        rate_factor, epochs_factor = SETTINGS[self.setting]
        variant = VARIANTS[cell.variant]
        changes = {
            "policy": variant.policy,
            "loss_scale": variant.loss_scale,
            "optimizer": cell.optimizer,
            "learning_rate": rates[cell.optimizer] * rate_factor,
            "num_epochs": self.num_epochs * epochs_factor,
            "seed": cell.seed,
        }
        return speech_ctc.Config(**values | changes)
