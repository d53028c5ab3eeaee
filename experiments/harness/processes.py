"""The processes of one run: how they start, agree and end.

With one process the functions wait for nothing. With several, every process must call
those that say "all call it", in the same order.
"""

import atexit
import collections
import json
import os
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.harness.config import BaseConfig
from experiments.harness.errors import (
    ConfigError,
    ExperimentError,
    WorkdirError,
    first_line,
)

T = TypeVar("T")

# Seconds without a sign of life after which a process counts as lost.
HEARTBEAT_TIMEOUT_S = 60
# Seconds by which JAX's own timeout at the start is longer than ours.
START_MARGIN_S = 60
# Seconds that the first process to end waits for the others.
SHUTDOWN_TIMEOUT_S = 30
# Seconds that a file of one process may take to be seen by another.
VISIBLE_TIMEOUT_S = 30
# Threads of XLA:CPU, at least.
NUM_CPU_THREADS = 64
_CPU_SCHEDULE = "xla_cpu_enable_concurrency_optimized_scheduler"
_AT_THE_END: list[Callable[[], None]] = []


def start(config: BaseConfig) -> None:
    """Connects this process to the others of --distributed; before any computation.

    Output of all but the first process is dropped from then on, errors are not.

    Raises:
      ConfigError: if no cluster is found, or the others do not start in time.
    """
    if not config.distributed or jax.distributed.is_initialized():
        return
    # It would catch SIGTERM in place of `experiments.harness.stop`.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own timeout aborts the process, without a word of what to do.
    timer = threading.Timer(config.start_timeout_s, _give_up, [config])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_index,
            initialization_timeout=config.start_timeout_s + START_MARGIN_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(_not_started(config, str(error))) from error
    finally:
        timer.cancel()
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def order_messages() -> None:
    """Keeps steps on several CPU devices from hanging; before any computation.

    By default XLA:CPU runs independent operations at once, and devices may send their
    messages in different orders. It reads the flag when it first compiles, and the
    number of threads when it first looks for devices.
    """
    # A thread that waits for a message is blocked. By default XLA:CPU has as many
    # threads as processors or devices, too few for steps that need more at a time.
    os.environ.setdefault("NPROC", str(max(NUM_CPU_THREADS, os.cpu_count() or 1)))
    flags = os.environ.get("XLA_FLAGS", "")
    if _CPU_SCHEDULE not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_CPU_SCHEDULE}=false"


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def first(make: Callable[[], T]) -> T:
    """Calls a function in the first process; all call it.

    Args:
      make: returns JSON values.

    Returns:
      What it returned, in every process.

    Raises:
      ExperimentError: in every process, if it raised one.
    """
    if jax.process_count() == 1:
        return make()
    error, said = None, {}
    if is_first():
        try:
            said = {"value": make()}
        except ExperimentError as raised:
            error = raised
            said = {"error": str(raised), "exit_code": raised.exit_code}
    said = _broadcast(said)
    if "error" not in said:
        return said["value"]
    error = error or ExperimentError(said["error"])
    error.exit_code = said["exit_code"]
    raise error.everywhere()


def largest(value: int) -> int:
    """Returns the largest of the values that the processes give; all call it."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.asarray(value))))


def wait_for_all() -> None:
    """Returns when every process has called it."""
    largest(0)


def check_same(values: dict[str, Any]) -> None:
    """Checks that all processes have the same JSON values; all call it.

    Args:
      values: by name, such as settings by flag.

    Raises:
      ConfigError: in every process, if one has others than the first one.
    """
    if jax.process_count() == 1:
        return
    expected, own = first(lambda: values), json.loads(json.dumps(values))
    texts = [
        f"{name} is {own.get(name)!r} there and {expected.get(name)!r} in process 0"
        for name in {**expected, **own}
        if own.get(name) != expected.get(name)
    ]
    process = largest(jax.process_index() if texts else 0)
    if process:
        what = "; ".join(texts) or "it says in which"
        raise ConfigError(
            f"process {jax.process_index() if texts else process} differs from process "
            f"0: {what}. Start all with the same flags, data and versions."
        ).everywhere()


def check_shared(path: Path) -> None:
    """Checks that all processes see one directory; all call it.

    Raises:
      WorkdirError: in every process, if one does not see what the first one writes.
    """
    if jax.process_count() == 1:
        return

    def write() -> str:
        file = path / f".shared-{secrets.token_hex(8)}"
        file.touch()
        return file.name

    # Nobody looks before it is there: a file system may remember that it was not.
    file = path / first(write)
    deadline = time.monotonic() + VISIBLE_TIMEOUT_S
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = multihost_utils.process_allgather(np.asarray(file.exists()))
    if is_first():
        file.unlink()
    blind = np.flatnonzero(~np.asarray(seen)).tolist()
    if blind:
        raise WorkdirError(
            f"process {blind[0]} does not see what process 0 writes in {path}: all "
            "processes write checkpoints there, so name a --workdir on a file system "
            "that all of them share."
        ).everywhere()


class Poll:
    """Asks after every step whether any process wants to stop.

    On GPUs it waits for none: an answer comes `DELAY` questions later, at the same step
    in every process. On CPUs it waits for the step and for the answer, because there
    computations that do not wait for each other run at once, and their messages mix.

    Attributes:
      has_several: whether there are several processes.
    """

    DELAY = 2

    def __init__(self):
        """Asks nothing yet."""
        self._answers: collections.deque[jax.Array] = collections.deque()
        self.has_several = jax.process_count() > 1
        self._waits = jax.default_backend() == "cpu"
        if self.has_several:
            mesh = Mesh(np.array(jax.devices()), ("all",))
            self._sharding = NamedSharding(mesh, PartitionSpec("all"))
            everywhere = NamedSharding(mesh, PartitionSpec())
            self._max = jax.jit(jax.numpy.max, out_shardings=everywhere)

    def largest(self, value: int, after: Any) -> int:
        """Returns the largest value of all, or of an earlier step, 0 before.

        Args:
          value: 0 or more.
          after: what the step has put out. All processes call it with those of the
            same step.
        """
        if not self.has_several:
            return value
        if self._waits:
            jax.block_until_ready(after)
        values = np.full(self._sharding.mesh.size, value, np.int32)
        asked = jax.make_array_from_callback(
            values.shape, self._sharding, values.__getitem__
        )
        self._answers.append(self._max(asked))
        if len(self._answers) <= (0 if self._waits else self.DELAY):
            return 0
        return int(self._answers.popleft())


def end_alone(error: Exception) -> None:
    """Ends this one of several processes after an error that the others do not know.

    At a usual exit JAX would wait for them, and they for this one.
    """
    if jax.process_count() == 1 or getattr(error, "is_everywhere", False):
        return
    if isinstance(error, ExperimentError):
        text, exit_code = str(error), error.exit_code
    else:
        traceback.print_exception(error)
        text, exit_code = first_line(error), 1
    print(
        f"error: process {jax.process_index()} of {jax.process_count()}: {text}\n"
        "The others end when they miss it; start all of them again with --resume.",
        file=sys.stderr,
        flush=True,
    )
    for clean_up in _AT_THE_END:
        clean_up()
    os._exit(exit_code)


def at_the_end(clean_up: Callable[[], None]) -> None:
    """Calls a function when this process ends, alone or with the others."""
    atexit.register(clean_up)
    _AT_THE_END.append(clean_up)


def _broadcast(value: Any) -> Any:
    """Returns the first process's JSON value in every process."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(data.size)))
    padded = np.zeros(size, np.uint8)
    if is_first():
        padded[:] = data
    sent = multihost_utils.broadcast_one_to_all(padded)
    return json.loads(np.asarray(sent).astype(np.uint8).tobytes())


def _give_up(config: BaseConfig) -> None:
    reason = f"waited for {config.start_timeout_s} s"
    print(f"error: {_not_started(config, reason)}", file=sys.stderr, flush=True)
    os._exit(ConfigError.exit_code)


def _not_started(config: BaseConfig, reason: str) -> str:
    if config.coordinator is None:
        return (
            f"--distributed: the processes were not connected ({reason}). See that all "
            "of them were started, by Slurm's srun, mpirun or Kubernetes; elsewhere, "
            "name --coordinator HOST:PORT, --num-processes and --process-index. "
            "--start-timeout-s waits longer."
        )
    return (
        f"process {config.process_index} of {config.num_processes} did not find the "
        f"others by {config.coordinator} ({reason}). See that all were started, with "
        "the same --coordinator and --num-processes and each with its own "
        "--process-index, that the host and port can be reached, and that the port is "
        "free; --start-timeout-s waits longer."
    )
