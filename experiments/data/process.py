"""Child processes that fetch data; they cannot hang, and ask for no input."""

import os
import subprocess
from collections.abc import Mapping, Sequence


def run(
    command: Sequence[str], *, timeout_s: float, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, with its output captured as text.

    Args:
      command: the program and its arguments.
      timeout_s: seconds until the process is killed.
      env: environment variables to add to this process's own.

    Raises:
      subprocess.TimeoutExpired: if it was killed.
    """
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **env},
    )
