"""Scalars as TensorBoard events, written by the calling thread.

`tensorboardX.SummaryWriter` writes from a thread of its own: when the disk is full, the
thread dies and the run waits for it forever. `EventFile` raises instead.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

# The gradient norm of a skipped step is Inf or NaN: expected, and shown by the loop.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)


class EventFile:
    """One file of events; every start of a run opens a new one."""

    def __init__(self, directory: Path, *, first_step: int = 0):
        """Opens a new file.

        Args:
          directory: directory of the run's events.
          first_step: TensorBoard drops events of later steps from earlier files.
        """
        directory.mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}.{first_step}"
        self._writer = EventsWriter(str(directory / "events"), suffix)
        self._event = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        start = {"status": "START"}
        self._write(self._event(step=first_step + 1, session_log=start))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Writes one number."""
        self._write(self._event(step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        """Hands everything to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
