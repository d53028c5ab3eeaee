"""Settings common to all experiments."""

import dataclasses
import datetime
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jmp

import mpjax
from experiments.harness.errors import ConfigError
from experiments.harness.loss_scales import parse_loss_scale

# Fields that do not affect the numbers: two runs may differ in them.
NOT_COMPARED = ("workdir", "resume", "data_dir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Settings common to all experiments; the docstrings are the flags' help."""

    policies: str = "float32,mixed_float16"
    """Precision policies, separated by commas. The same seed runs once per policy, and
    a table compares them."""

    policy: str | None = None
    """One precision policy, instead of --policies: float32, mixed_float16,
    mixed_bfloat16, float16, bfloat16, or a jmp string such as p=f32,c=f16,o=f32."""

    autocast: bool = True
    """How a mixed policy is applied: --autocast runs matmuls and convolutions in half
    and sensitive ops in float32, --no-autocast casts parameters and inputs to half."""

    loss_scale: str = "auto"
    """Loss scaling: auto (dynamic if the policy computes in float16, otherwise none),
    none, static:128, dynamic, dynamic:32768, histogram, histogram:32768."""

    seed: int = 0
    """Seed for parameters, data order and everything else that is random."""

    workdir: Path | None = None
    """Directory for results; runs/NAME-DATE-TIME by default."""

    resume: bool = False
    """Continue the run in --workdir from its newest checkpoint."""

    num_checkpoints: int = 2
    """Number of checkpoints to keep. 0 writes none; the run cannot be resumed."""

    max_consecutive_skipped: int = 20
    """Stop training after this many steps in a row with non-finite gradients at the
    smallest loss scale."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        require_positive(self, "max_consecutive_skipped")
        require(self.num_checkpoints >= 0, "--num-checkpoints", "0 or more", self)
        require(0 <= self.seed < 2**32, "--seed", "between 0 and 2**32 - 1", self)
        if not self.policy_names():
            raise ConfigError("--policies names no policy; try float32,mixed_float16.")
        for name in self.policy_names():
            self.make_policy(name)
            self.make_loss_scale(name)
        if self.resume and self.workdir is None:
            raise ConfigError(
                "--resume needs --workdir: name the directory of the run to continue."
            )

    def policy_names(self) -> tuple[str, ...]:
        """Returns the policies to run, in order, each once."""
        if self.policy is not None:
            return (self.policy,)
        return tuple(dict.fromkeys(split_policies(self.policies)))

    def make_policy(self, name: str) -> jmp.Policy:
        """Returns the policy of that name.

        Raises:
          ConfigError: if there is none, or if it needs 64-bit numbers that JAX has
            switched off.
        """
        try:
            policy = mpjax.get_policy(name)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        is_64_bit = jnp.float64 in dataclasses.astuple(policy)
        if is_64_bit and not jax.config.values["jax_enable_x64"]:
            raise ConfigError(
                f"policy {name!r} needs 64-bit numbers, which are switched off in JAX; "
                "set the environment variable JAX_ENABLE_X64=1."
            )
        return policy

    def make_loss_scale(self, policy: str) -> Any:
        """Returns the loss scale for a policy.

        Raises:
          ConfigError: if --loss-scale cannot be read.
        """
        try:
            return parse_loss_scale(self.loss_scale_name(policy))
        except ValueError as error:
            raise ConfigError(f"--loss-scale: {error}") from error

    def loss_scale_name(self, policy: str) -> str:
        """Returns what `auto` means for a policy, and any other setting unchanged."""
        if self.loss_scale != "auto":
            return self.loss_scale
        compute_dtype = self.make_policy(policy).compute_dtype
        return "dynamic" if compute_dtype == jnp.float16 else "none"

    def resume_flags(self) -> tuple[str, ...]:
        """Returns the flags that continue the run; `workdir` must be set."""
        return ("--workdir", str(self.workdir), "--resume")

    def comparable(self) -> dict[str, Any]:
        """Returns the settings that two equal runs share, as JSON values."""
        fields = dataclasses.asdict(self)
        return {k: _plain(v) for k, v in fields.items() if k not in NOT_COMPARED}


def split_policies(text: str) -> list[str]:
    """Splits at commas, except for those inside a jmp string.

    >>> split_policies("float32, p=f32,c=f16,o=f32, p=f32,c=bf16")
    ['float32', 'p=f32,c=f16,o=f32', 'p=f32,c=bf16']
    """
    names: list[str] = []
    for piece in filter(None, map(str.strip, text.split(","))):
        before = names[-1].split(",") if names and "=" in names[-1] else []
        keys = {part.split("=")[0] for part in before}
        if keys and "=" in piece and piece.split("=")[0] not in keys:
            names[-1] += f",{piece}"
        else:
            names.append(piece)
    return names


def default_workdir(experiment: str) -> Path:
    """Returns runs/NAME-DATE-TIME here, or with a suffix where that exists."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    suffixes = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    paths = (Path("runs") / f"{experiment}-{now}{suffix}" for suffix in suffixes)
    return next(path for path in paths if not path.exists())


def require(holds: bool, flag: str, what: str, config: Any) -> None:
    """Raises ConfigError unless the condition `holds`; names the flag and its value."""
    if not holds:
        value = getattr(config, flag.removeprefix("--").replace("-", "_"))
        raise ConfigError(f"{flag} must be {what}, got {value}.")


def require_positive(config: Any, *names: str) -> None:
    """Raises ConfigError unless these fields are positive and finite."""
    for name in names:
        flag = "--" + name.replace("_", "-")
        holds = 0 < getattr(config, name) < math.inf
        require(holds, flag, "greater than zero", config)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
