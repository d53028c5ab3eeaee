"""Errors that a person can do something about; the command line shows them as text."""


class ExperimentError(Exception):
    """An expected failure. Its message says what happened and what to do.

    `exit_code` is what the process ends with.
    """

    exit_code = 1


class ConfigError(ExperimentError):
    """A setting that cannot work."""

    exit_code = 2


class DataError(ExperimentError):
    """A dataset that cannot be had, read or kept."""


class WorkdirError(ExperimentError):
    """A working directory that holds something else, or cannot be written."""


class CheckpointError(ExperimentError):
    """No checkpoint can be restored."""


def first_line(error: BaseException) -> str:
    """Returns the type and the first line of an error's message, in 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
