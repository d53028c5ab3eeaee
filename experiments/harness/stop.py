"""Graceful shutdown on Ctrl-C and SIGTERM."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from experiments.harness.errors import ExperimentError


class Interrupted(ExperimentError):
    """A signal stopped the run; its state is on disk.

    Attributes:
      signal_number: SIGINT or SIGTERM.
      flags: flags to add to the same command in order to continue.
    """

    def __init__(self, signal_number: int, kept: str, flags: Sequence[str] = ()):
        """Builds the message.

        Args:
          signal_number: SIGINT or SIGTERM.
          kept: the state on disk, such as "saved after step 12".
          flags: flags to add to the same command in order to continue.
        """
        added = f" and {' '.join(flags)}" if flags else ""
        name = signal.Signals(signal_number).name
        super().__init__(
            f"stopped by {name}; {kept}. Continue with the same flags{added}."
        )
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        self.flags = tuple(flags)


class StopRequest:
    """Whether a signal has asked the run to stop; a second signal interrupts at once.

    Attributes:
      signal_number: the first signal that came; None before.
    """

    signal_number: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_number is not None

    def check(self, kept: str, flags: Sequence[str] = ()) -> None:
        """Raises `Interrupted` with these arguments if a signal has come."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number, kept, flags)

    def handle(self, number: int, frame: object) -> None:
        """The signal handler."""
        del frame
        if self.requested:
            raise KeyboardInterrupt
        self.signal_number = number
        if sys.stderr.isatty():
            text = "\nstopping after the steps under way; once more to stop at once\n"
            os.write(sys.stderr.fileno(), text.encode())


_outer: StopRequest | None = None


@contextlib.contextmanager
def on_signals() -> Iterator[StopRequest]:
    """Catches SIGINT and SIGTERM while the block runs.

    A block inside another one shares its request, so that a signal that comes too late
    for one run stops the next. Outside the main thread no signal is caught.
    """
    global _outer
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    if _outer is not None:
        yield _outer
        return
    _outer = request = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, request.handle) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _outer = None
