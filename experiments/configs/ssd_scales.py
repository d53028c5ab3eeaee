"""The flags of the comparison of loss scales on the single-shot detector."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from experiments.configs import ssd_digits
from experiments.data.detection.scenes_config import ScenesConfig
from experiments.harness.config import Variant, require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.flags import parse_names

Setting = Literal["default", "small_gradients"]


VARIANTS = {
    "float32": Variant("float32", "none"),
    "unscaled": Variant("mixed_float16", "none"),
    "scale_8": Variant("mixed_float16", "static:8"),
    "scale_128": Variant("mixed_float16", "static:128"),
    "scale_1024": Variant("mixed_float16", "static:1024"),
    "dynamic": Variant("mixed_float16", "dynamic"),
    "histogram": Variant("mixed_float16", "histogram"),
    "mixed_bfloat16": Variant("mixed_bfloat16", "none"),
}
# What the second setting changes: a deeper trunk, a loss divided by default boxes x
# batch, a larger batch, and a factor, each of which makes gradients smaller. Without
# the factor float16 loses a fifth of them, but only the smallest, and trains as well.
SETTINGS: dict[Setting, dict[str, Any]] = {
    "default": {},
    "small_gradients": {"depth": 1, "normalization": "anchors", "loss_factor": 2**-8},
}
BATCH_FACTORS: dict[Setting, float] = {"default": 1, "small_gradients": 1.5}
# Flags of `ssd_digits` that a variant or the setting decides.
DECIDED = (
    *("policies", "policy", "loss_scale", "predict"),
    *("depth", "normalization", "loss_factor"),
)


class Cell(NamedTuple):
    """One run: a variant and a seed."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Returns the name of its directory."""
        return f"{self.variant}-{self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ssd_digits.Config):
    """Settings of the comparison; --policies and the like are decided by variants."""

    EXTENSIBLE: ClassVar[tuple[str, ...]] = ()

    variants: str = ",".join(VARIANTS)
    """Ways to train, separated by commas."""

    num_seeds: int = 3
    """Runs per way; their seeds begin with --seed, and are the same for all ways."""

    setting: Setting = "default"
    """default; or small_gradients, which is there to make float16 fail: a deeper trunk,
    a loss divided by the default boxes of the batch and by 256, and a batch half as
    large again."""

    scenes: ScenesConfig = dataclasses.field(
        default_factory=lambda: ScenesConfig(num_train=2000, num_test=500)
    )
    """What digits are placed on a canvas, and how."""

    num_val: int = 100
    """Further scenes, for validation."""

    num_epochs: int = 3
    """Passes over the training set."""

    numerics: bool = True
    """Count the exponents of activation gradients; --no-numerics leaves out what is
    known of them."""

    numerics_interval: int = 10
    """Steps from one count to the next."""

    batch_size: int = 32
    """Images per step, in the default setting."""

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
        require_positive(self, "num_seeds")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in DECIDED:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is decided by --variants and "
                    "--setting here; choose by them, or use python -m "
                    "experiments.ssd_digits."
                )
        self.variant_names()

    def comparable(self) -> dict[str, Any]:
        """Returns the settings that a resumed comparison shares: all but which runs."""
        more = ("variants", "num_seeds", "output")
        return {k: v for k, v in super().comparable().items() if k not in more}

    def variant_names(self) -> list[str]:
        """Returns the ways to train, each once.

        Raises:
          ConfigError: for one that does not exist.
        """
        return [*dict.fromkeys(parse_names("--variants", self.variants, VARIANTS))]

    def cells(self) -> list[Cell]:
        """Returns the runs, all variants of the first seed first."""
        seeds = range(self.seed, self.seed + self.num_seeds)
        names = self.variant_names()
        return [Cell(name, seed) for seed in seeds for name in names]

    def run_config(self, cell: Cell) -> ssd_digits.Config:
        """Returns the settings of one run."""
        fields = dataclasses.fields(ssd_digits.Config)
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields}
        variant = VARIANTS[cell.variant]
        values |= {"policy": variant.policy, "loss_scale": variant.loss_scale}
        values |= {"seed": cell.seed, **SETTINGS[self.setting]}
        values["batch_size"] = int(self.batch_size * BATCH_FACTORS[self.setting])
        return ssd_digits.Config(**values)
