"""Errors that the user can act on; the command line prints them as text."""

from typing import Self


class ExperimentError(Exception):
    """An expected failure. Its message says what happened and what to do.

    Attributes:
      exit_code: exit code of the process.
      is_everywhere: whether every process of a run raised it.
    """

    exit_code = 1
    is_everywhere = False

    def everywhere(self) -> Self:
        """Returns the error, marked as one that every process raises."""
        self.is_everywhere = True
        return self


class ConfigError(ExperimentError):
    """A setting that cannot work."""

    exit_code = 2


class DataError(ExperimentError):
    """A dataset that is unavailable, damaged or cannot be stored."""


class AudioError(DataError):
    """One recording that cannot be read, or is too short to be trained on."""


class WorkdirError(ExperimentError):
    """A working directory that holds another run, or cannot be written."""


class CheckpointError(ExperimentError):
    """A checkpoint cannot be written, or none can be restored."""


def first_line(error: BaseException) -> str:
    """Returns the type and the first line of an error's message, in 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
