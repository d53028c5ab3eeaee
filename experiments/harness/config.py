"""Settings common to all experiments; imports nothing that is slow to import."""

import dataclasses
import datetime
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from experiments.harness.errors import ConfigError
from experiments.harness.flags import did_you_mean

if TYPE_CHECKING:
    import jmp

# What `mpjax.PRESETS` and jmp name, so that a name is checked before JAX is imported.
PRESETS = (
    "float32",
    "float64",
    "mixed_float16",
    "mixed_bfloat16",
    "mixed_float8",
    "mixed_float8:all",
    "float16",
    "bfloat16",
)
DTYPES = ("full", "half", "f16", "bf16", "f32", "f64")
# Loss scales without numbers; `static` has one.
LOSS_SCALES = ("none", "dynamic", "histogram")
# How the devices of a run are found and used; sums over them may round otherwise.
DEVICES = (
    "mesh",
    "distributed",
    "coordinator",
    "num_processes",
    "process_index",
    "start_timeout_s",
)
# Fields in which two equal runs may differ, so that a run goes on elsewhere.
NOT_COMPARED = ("workdir", "resume", "data_dir", *DEVICES)


class Variant(NamedTuple):
    """A way to train.

    Attributes:
      policy: precision policy.
      loss_scale: as in --loss-scale.
    """

    policy: str
    loss_scale: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Settings common to all experiments; the docstrings are the flags' help.

    Attributes:
      EXTENSIBLE: settings, such as `num_epochs`, that a resumed run may have larger
        than the run that it continues; it then trains past its old end.
      SCHEDULE_SPANS_RUN: whether the learning rate of a step depends on these settings;
        then an extended run is not the run that would have been so long from the start,
        and its result says so.
    """

    EXTENSIBLE: ClassVar[tuple[str, ...]] = ()
    SCHEDULE_SPANS_RUN: ClassVar[bool] = True

    policies: str = "float32,mixed_float16"
    """Precision policies, separated by commas. The same seed runs once per policy, and
    a table compares them."""

    policy: str | None = None
    """One precision policy, instead of --policies: float32, mixed_float16,
    mixed_bfloat16, mixed_float8, mixed_float8:all (matmuls of every size), float16,
    bfloat16, or a jmp string such as p=f32,c=f16,o=f32."""

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
    """Continue the run in --workdir from its newest checkpoint; with the same flags it
    ends as if it had not been stopped."""

    num_checkpoints: int = 2
    """Number of checkpoints to keep. 0 writes none; the run cannot be resumed."""

    max_consecutive_skipped: int = 20
    """Stop training after this many steps in a row with non-finite gradients at the
    smallest loss scale."""

    mesh: str | None = None
    """Train on several devices: data=4 splits each batch, fsdp=4 parameters and
    optimizer state too, data=2,fsdp=4 both; -1 stands for the devices that are left."""

    distributed: bool = False
    """Train in several processes, each started with the same command, and a --workdir
    that all see. Slurm, Open MPI and Kubernetes tell them of each other; elsewhere the
    next three flags do. Without --mesh, data=-1."""

    coordinator: str | None = None
    """HOST:PORT of process 0, a free port that the others can reach."""

    num_processes: int | None = None
    """How many processes there are."""

    process_index: int | None = None
    """Which of them this one is, from 0."""

    start_timeout_s: int = 300
    """Seconds after which a process gives up waiting for the others to start."""

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
        default = {f.name: f.default for f in dataclasses.fields(self)}["policies"]
        if self.policy is not None and self.policies != default:
            raise ConfigError(
                "--policy and --policies exclude each other; name all in --policies."
            )
        for name in self.policy_names():
            check_policy("--policies" if self.policy is None else "--policy", name)
        is_float8 = any(name.startswith("mixed_float8") for name in self.policy_names())
        if not self.autocast and is_float8:
            raise ConfigError(
                "--no-autocast: mixed_float8 scales the operands of each matmul, which "
                "only --autocast does; or take mixed_bfloat16."
            )
        check_loss_scales("--loss-scale", [self.loss_scale], ("auto", *LOSS_SCALES))
        if self.resume and self.workdir is None:
            raise ConfigError(
                "--resume needs --workdir: name the directory of the run to continue."
            )
        _check_processes(self)

    def check_paths(self, experiment: str) -> None:
        """Checks what the flags name on the disk, before anything slow is imported.

        Args:
          experiment: the name of the experiment that is to run.

        Raises:
          ExperimentError: if a path is missing, or is not what it is named as.
        """
        from experiments.harness.workdir import check_workdir

        check_workdir(self, experiment)

    def policy_names(self) -> tuple[str, ...]:
        """Returns the policies to run, in order, each once."""
        if self.policy is not None:
            return (self.policy,)
        return tuple(dict.fromkeys(split_policies(self.policies)))

    def make_loss_scale(self, policy: str) -> Any:
        """Returns the loss scale for a policy."""
        from experiments.harness.loss_scales import parse_loss_scale

        return parse_loss_scale(self.loss_scale_name(policy))

    def loss_scale_name(self, policy: str) -> str:
        """Returns what `auto` means for a policy, and any other setting unchanged."""
        if self.loss_scale != "auto":
            return self.loss_scale
        return "dynamic" if compute_dtype(policy) == "float16" else "none"

    def resume_flags(self) -> tuple[str, ...]:
        """Returns the flags that continue the run; `workdir` must be set."""
        return ("--workdir", str(self.workdir), "--resume")

    def comparable(self) -> dict[str, Any]:
        """Returns the settings that two equal runs share, as JSON values."""
        fields = dataclasses.asdict(self)
        return {k: _plain(v) for k, v in fields.items() if k not in NOT_COMPARED}


def check_policy(flag: str, name: str) -> None:
    """Checks the name of a policy; only a jmp string or float64 makes it import JAX.

    Args:
      flag: as it is typed, for the error.
      name: as `mpjax.get_policy` takes it.

    Raises:
      ConfigError: if there is no such policy, or if it needs 64-bit numbers that JAX
        has switched off.
    """
    is_string = "=" in name or name in DTYPES
    if not is_string and name not in PRESETS:
        raise ConfigError(
            f"{flag}: unknown policy {name!r}.{did_you_mean(name, PRESETS)} Expected "
            f"one of {', '.join(PRESETS)}, or a jmp string such as p=f32,c=f16,o=f32."
        )
    if is_string or name == "float64":
        try:
            make_policy(name)
        except ConfigError as error:
            raise ConfigError(f"{flag}: {error}") from error


def make_policy(name: str) -> "jmp.Policy":
    """Returns the policy of that name.

    Raises:
      ConfigError: if there is none, or if it needs 64-bit numbers that JAX has switched
        off.
    """
    import jax

    import mpjax

    try:
        policy = mpjax.get_policy(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    is_64_bit = jax.numpy.float64 in dataclasses.astuple(policy)
    if is_64_bit and not jax.config.values["jax_enable_x64"]:
        raise ConfigError(
            f"policy {name!r} needs 64-bit numbers, which are switched off in JAX; "
            "set the environment variable JAX_ENABLE_X64=1."
        )
    return policy


def compute_dtype(policy: str) -> str:
    """Returns the name of the dtype in which a policy computes, such as "float16"."""
    import jax

    return jax.numpy.dtype(make_policy(policy).compute_dtype).name


def matmul_dtype(policy: str) -> str:
    """Returns the name of the dtype in which a policy multiplies: "float8", too."""
    from mpjax.policy import Float8Policy

    is_float8 = isinstance(make_policy(policy), Float8Policy)
    return "float8" if is_float8 else compute_dtype(policy)


def check_loss_scales(
    flag: str, texts: Sequence[str], plain: Sequence[str] = LOSS_SCALES
) -> None:
    """Checks loss scales; only those with numbers make it import JAX.

    Args:
      flag: as it is typed, for the error.
      texts: loss scales, each as `parse_loss_scale` reads it or in `plain`.
      plain: loss scales without numbers.

    Raises:
      ConfigError: for the first that cannot be read.
    """
    kinds = (*plain, "static")
    for text in texts:
        kind = text.partition(":")[0].strip()
        if kind not in kinds:
            raise ConfigError(
                f"{flag}: cannot read loss scale {text!r}.{did_you_mean(kind, kinds)} "
                f"Expected {', '.join(plain)}, static:128, dynamic:32768 or "
                "histogram:32768."
            )
    for text in texts:
        if text not in plain:
            from experiments.harness.loss_scales import parse_loss_scale

            try:
                parse_loss_scale(text)
            except ValueError as error:
                raise ConfigError(f"{flag}: {error}") from error


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


def _check_processes(config: BaseConfig) -> None:
    """Raises ConfigError unless the flags of --distributed go together."""
    require_positive(config, "start_timeout_s")
    flags = {
        "--coordinator": config.coordinator,
        "--num-processes": config.num_processes,
        "--process-index": config.process_index,
    }
    given = [flag for flag, value in flags.items() if value is not None]
    if given and not config.distributed:
        raise ConfigError(f"{given[0]} is for --distributed; add it.")
    if given and len(given) < len(flags):
        missing = [flag for flag in flags if flag not in given]
        raise ConfigError(
            f"{given[0]} needs {' and '.join(missing)} too; leave all out under Slurm, "
            "Open MPI or Kubernetes."
        )
    if config.coordinator is not None:
        host, _, port = config.coordinator.rpartition(":")
        is_address = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
        require(is_address, "--coordinator", "HOST:PORT", config)
        require_positive(config, "num_processes")
        require(
            0 <= (config.process_index or 0) < (config.num_processes or 0),
            "--process-index",
            f"from 0 to {(config.num_processes or 0) - 1}",
            config,
        )


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
