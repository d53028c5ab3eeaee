"""Ctrl-C and SIGTERM as a wish to stop, fulfilled at the next step."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """Set by the first signal; the second one interrupts at once."""

    signal_number: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_number is not None


@contextlib.contextmanager
def on_signals() -> Iterator[StopRequest]:
    """Catches SIGINT and SIGTERM; elsewhere than in the main thread it does nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number, frame):
        del frame
        if request.requested:
            raise KeyboardInterrupt
        request.signal_number = number

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, handle) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
