"""The directory of a run: one configuration, one process at a time."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from experiments.harness.config import BaseConfig, default_workdir
from experiments.harness.errors import WorkdirError
from experiments.harness.files import read_json, translate_os_errors, write_json

CHECKPOINTS = "checkpoints"
_EXTENDED_FROM = "extended_from"  # in config.json: a setting's earlier values, by name


class Workdir(NamedTuple):
    """The directory of a run, as one of its processes sees it.

    The first process works in the run's own directory. Every other one works in a copy
    of its own, which is deleted at the end, so that all run the same program and none
    writes over another; only checkpoints are one for all.

    Attributes:
      path: where this process reads and writes.
      shared: the run's own directory.
    """

    path: Path
    shared: Path

    def make_directory(self, name: str) -> Path:
        """Returns the directory of one run of a comparison, made if it is missing."""
        directory = self.path / name
        directory.mkdir(exist_ok=True)
        if self.path != self.shared:
            (directory / CHECKPOINTS).symlink_to(
                (self.shared / name / CHECKPOINTS).resolve()
            )
        return directory


@contextlib.contextmanager
def open_workdir(config: BaseConfig, experiment: str) -> Iterator[Workdir]:
    """Makes or reopens the run's directory and holds its lock during the block.

    A resumed run may be longer than it was (`BaseConfig.EXTENSIBLE`); then its results
    are removed, to be made again after the new end. All processes call it.

    Args:
      config: names the directory (by default a new one below `runs`) and says whether
        to resume.
      experiment: its name, which a resumed run must share.

    Raises:
      WorkdirError: if the directory holds another configuration, holds a run without
        --resume, holds no run with --resume, is in use, cannot be written, or is not
        seen by all processes.
    """
    from experiments.harness import processes  # imports JAX

    with contextlib.ExitStack() as stack:

        def enter() -> str:
            return str(stack.enter_context(_locked(config, experiment)))

        path = Path(processes.first(enter))
        processes.check_shared(path)
        processes.check_same({**config.comparable(), "mesh": config.mesh})
        own = path
        if not processes.is_first():
            own = _copy(path)
        processes.wait_for_all()  # the first one goes on to write
        yield Workdir(own, path)


@contextlib.contextmanager
def _locked(config: BaseConfig, experiment: str) -> Iterator[Path]:
    path = (config.workdir or default_workdir(experiment)).expanduser()
    lock = filelock.FileLock(path / ".lock", timeout=0)
    try:
        check_workdir(config, experiment)
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise WorkdirError(
            f"another process is running in {path}; wait for it, or use another "
            "--workdir."
        ) from None
    except OSError as error:
        raise _unusable(path, error.strerror or error) from error
    try:
        with translate_os_errors(path):
            _update_settings(path, config, experiment)
        yield path
    finally:
        lock.release()


def _copy(path: Path) -> Path:
    """Returns a copy of a run's directory, without checkpoints and events.

    It is deleted when the process ends, because reports are made after the run.
    """
    from experiments.harness import processes

    own = Path(tempfile.mkdtemp(prefix="mpjax-"))
    processes.at_the_end(lambda: shutil.rmtree(own, ignore_errors=True))
    ignored = shutil.ignore_patterns(CHECKPOINTS, "damaged-*", "tensorboard", ".*")
    shutil.copytree(path, own, ignore=ignored, dirs_exist_ok=True)
    return own


def extension_note(path: Path) -> str | None:
    """Returns what an extended run's result differs in; None if in nothing.

    Args:
      path: the run's directory, which `open_workdir` has opened.
    """
    settings = read_json(path / "config.json")
    earlier = settings.get(_EXTENDED_FROM, {})
    if not earlier:
        return None
    changes = ", ".join(
        f"{name} {' then '.join(map(str, values))} then {settings[name]}"
        for name, values in earlier.items()
    )
    return (
        f"this run was extended ({changes}): its first steps took the learning rates "
        "of the shorter schedule, so that the result is not that of one long run."
    )


def check_workdir(config: BaseConfig, experiment: str) -> None:
    """Checks that a run can start, or be resumed, in its directory; changes nothing.

    Args:
      config: names the directory and says whether to resume.
      experiment: its name, which a resumed run must share.

    Raises:
      WorkdirError: if the directory holds another configuration, holds a run without
        --resume, holds no run with --resume, or cannot be made or written.
    """
    if config.workdir is None:
        return
    path = config.workdir.expanduser()
    if os.path.isfile(path / "config.json"):
        _compare(path, config, experiment)
    elif config.resume:
        raise WorkdirError(
            f"--resume: {path} holds no run; leave --resume out to start one there."
        )
    found = next(x for x in (path, *path.absolute().parents) if os.path.lexists(x))
    if not os.path.isdir(found):
        raise _unusable(path, f"{found} is not a directory")
    if not os.access(found, os.W_OK | os.X_OK):
        raise _unusable(path, f"{found} cannot be written")


def _unusable(path: Path, reason: object) -> WorkdirError:
    return WorkdirError(
        f"cannot use --workdir {path}: {reason}; choose a directory that can be "
        "written."
    )


def check_is_run(path: Path) -> Path:
    """Returns the settings file of a run's directory.

    Raises:
      WorkdirError: if it holds no run.
    """
    file = path.expanduser() / "config.json"
    if not os.path.isfile(file):
        raise WorkdirError(
            f"{path} holds no run: there is no {file.name} in it. Name the --workdir "
            "of a run."
        )
    return file


def _update_settings(path: Path, config: BaseConfig, experiment: str) -> None:
    """Writes config.json into a new directory, and where a run grows."""
    if not (path / "config.json").is_file():
        write_json(path / "config.json", _settings(config, experiment))
    elif grown := _compare(path, config, experiment):
        _extend(path, config, experiment, grown)


def _settings(config: BaseConfig, experiment: str) -> dict[str, Any]:
    return {"experiment": experiment, **config.comparable()}


def _compare(path: Path, config: BaseConfig, experiment: str) -> list[str]:
    """Compares the settings with those of the run that a directory holds.

    Returns:
      The settings in which a resumed run is longer than it was.

    Raises:
      WorkdirError: if others differ, or if it is not to be resumed.
    """
    wanted = _settings(config, experiment)
    file = path / "config.json"
    existing = read_json(file)
    if not isinstance(existing, dict):
        raise WorkdirError(
            f"{file} is damaged: expected settings by name, got {existing!r}; use "
            "another --workdir."
        )
    names = [name for name in {**existing, **wanted} if name != _EXTENDED_FROM]
    differing = [name for name in names if existing.get(name) != wanted.get(name)]
    grown = [
        name
        for name in differing
        if name in config.EXTENSIBLE and _is_larger(wanted[name], existing.get(name))
    ]
    if differing != grown:
        names = [name for name in differing if name not in grown]
        raise WorkdirError(_differences(path, existing, wanted, names, config))
    if not config.resume:
        more = "".join(f" ({name} was {existing[name]})" for name in grown)
        raise WorkdirError(
            f"{path} already holds this run{more}; pass --resume to continue it, or "
            "use another --workdir."
        )
    return grown


def _is_larger(value: Any, than: Any) -> bool:
    return isinstance(than, int) and value > than


def _differences(
    path: Path,
    existing: dict[str, Any],
    wanted: dict[str, Any],
    names: list[str],
    config: BaseConfig,
) -> str:
    """Returns the error that names the settings in which two runs differ."""
    texts = [
        f"{name} is {existing.get(name)!r} there and {wanted.get(name)!r} here"
        + (" (--resume can raise it only)" if name in config.EXTENSIBLE else "")
        for name in names
    ]
    return (
        f"{path} holds a run with another configuration: {'; '.join(texts)}. Use the "
        "same flags, or another --workdir."
    )


def _extend(path: Path, config: BaseConfig, experiment: str, grown: list[str]) -> None:
    """Makes a run longer: its results go, its checkpoints are continued.

    The settings are written last: an interruption before leaves the shorter run, whose
    results are made again from its checkpoints.

    Raises:
      WorkdirError: if a finished policy has no checkpoint to continue.
    """
    existing = read_json(path / "config.json")
    wanted = _settings(config, experiment)
    finished = sorted(path.glob("*/result.json"))
    for file in finished:
        steps = (file.parent / CHECKPOINTS).glob("[0-9]*")
        if not any(step.name.isdigit() for step in steps):
            raise WorkdirError(
                f"{file.parent} has no checkpoint to go on from, because it ran with "
                "--num-checkpoints 0. Train the longer run in another --workdir."
            )
    for file in (path / "result.json", *finished):
        file.unlink(missing_ok=True)
    if config.SCHEDULE_SPANS_RUN:
        earlier = existing.get(_EXTENDED_FROM, {})
        wanted = wanted | {
            _EXTENDED_FROM: {n: [*earlier.get(n, []), existing[n]] for n in grown}
        }
    write_json(path / "config.json", wanted)
    for name in grown:
        print(
            f"{name} grows from {existing[name]} to {wanted[name]}: the run goes on "
            "past its old end",
            flush=True,
        )
