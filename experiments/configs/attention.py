"""The --attention flag of benchmarks."""

from experiments.harness.errors import ConfigError
from experiments.harness.flags import did_you_mean

AUTO, XLA, CUDNN = CHOICES = ("auto", "xla", "cudnn")


def check_attention(value: str) -> None:
    """Checks the value of --attention.

    Raises:
      ConfigError: if it is none of CHOICES.
    """
    if value not in CHOICES:
        raise ConfigError(
            f"--attention must be one of {', '.join(CHOICES)}, got {value!r}."
            f"{did_you_mean(value, CHOICES)}"
        )
