"""Whole training states on disk, by orbax, with checksums of arrays and files.

A state is stored as a flat dictionary of plain arrays by name, so that a checkpoint
does not depend on the classes that made it.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.harness.errors import CheckpointError
from experiments.harness.files import write_json


class Checkpoints:
    """The newest checkpoints of one run."""

    def __init__(self, directory: Path, *, keep: int):
        """Opens the directory, making it if need be.

        Args:
          directory: of this run's checkpoints alone.
          keep: how many to keep; 0 saves none.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = directory.resolve()
        self.keep = keep
        self._checksum_file = self.directory.with_name("checkpoints.json")
        self._manager = self._open() if keep else None

    def save(self, step: int, state: Any) -> None:
        """Writes the state as it is after `step` steps; returns when it is on disk.

        Raises:
          CheckpointError: if it cannot be written; those before are kept.
        """
        if self._manager is None or step in self._manager.all_steps():
            return
        arrays = to_arrays(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            meta=ocp.args.JsonSave({"sha256": digest(arrays)}),
        )
        try:
            # Asked first, because orbax's threads tell of a full disk at length.
            free_bytes = shutil.disk_usage(self.directory).free
            if free_bytes < sum(array.nbytes for array in arrays.values()):
                raise OSError(f"{free_bytes / 2**20:.1f} MiB are free on the disk")
            self._manager.save(step, args=args, force=True)
            self._manager.wait_until_finished()
            self._write_checksums()
        except Exception as error:  # orbax and its writers raise anything
            raise CheckpointError(
                f"cannot write checkpoint {step} to {self.directory}: "
                f"{_first_line(error)}. Free some space, or make it writable, then "
                "continue with --resume; the checkpoints before are kept."
            ) from error

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """Reads the newest sound checkpoint; reports and sets aside damaged ones.

        Where none is sound, they stay where they are.

        Args:
          template: a state of the same structure, shapes and dtypes.

        Returns:
          The number of steps and the state; None if there is no checkpoint.

        Raises:
          CheckpointError: if there are checkpoints and none is sound.
        """
        if self._manager is None:
            return None
        damaged: dict[int, str] = {}
        for step in sorted(self._steps_on_disk(), reverse=True):
            try:
                state = self._read(step, template)
            except Exception as error:  # orbax and its readers raise anything
                damaged[step] = _first_line(error)
                continue
            self._set_aside(damaged, step)
            return step, state
        if damaged:
            steps = ", ".join(map(str, damaged))
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged (steps {steps}; "
                f"{next(iter(damaged.values()))}). Put a copy of one there, or start "
                "again in another --workdir."
            )
        return None

    def close(self) -> None:
        """Ends orbax's threads; what they could not write, `save` has told."""
        if self._manager is not None:
            with contextlib.suppress(Exception):
                self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _read(self, step: int, template: Any) -> Any:
        assert self._manager is not None
        self._check_files(step)
        arrays = to_arrays(template)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(arrays), meta=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=args)
        if digest(restored["state"]) != restored["meta"]["sha256"]:
            raise ValueError("its content does not match its checksum")
        return from_arrays(template, restored["state"])

    def _write_checksums(self) -> None:
        """Keeps the checksums of the files of each checkpoint, beside them all."""
        held = self._checksums()
        for step in self._steps_on_disk():
            name = str(step)
            held[name] = held.get(name) or _file_checksums(self.directory / name)
        kept = map(str, self._steps_on_disk())
        write_json(self._checksum_file, {name: held[name] for name in kept})

    def _check_files(self, step: int) -> None:
        """Spares orbax a damaged file, of which its threads would tell at length."""
        expected = self._checksums().get(str(step), {})
        got = _file_checksums(self.directory / str(step))
        for name, checksum in expected.items():
            if got.get(name) != checksum:
                what = "is changed" if name in got else "is missing"
                raise ValueError(f"its file {name} {what}")

    def _checksums(self) -> dict[str, dict[str, str]]:
        """By step and file; none where a kill came before they were written."""
        try:
            return json.loads(self._checksum_file.read_text())
        except (OSError, ValueError):
            return {}

    def _steps_on_disk(self) -> list[int]:
        """Every checkpoint that was finished, also where orbax does not know it now."""
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        return [int(name) for name in names if name.isdigit()]

    def _set_aside(self, damaged: dict[int, str], sound: int) -> None:
        if not damaged:
            return
        self.close()
        for step, reason in damaged.items():
            target = _free_name(self.directory.parent / f"damaged-checkpoint-{step}")
            (self.directory / str(step)).rename(target)
            self._write_checksums()
            print(
                f"checkpoint {step} is damaged ({reason}); moved to {target}, going on "
                f"from checkpoint {sound}",
                file=sys.stderr,
                flush=True,
            )
        self._manager = self._open()


def to_arrays(state: Any) -> dict[str, Any]:
    """Returns the leaves of a state by name; PRNG keys as their data."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): _to_data(leaf) for path, leaf in leaves}


def from_arrays(template: Any, arrays: dict[str, Any]) -> Any:
    """Rebuilds a state; every leaf has the dtype, and the place, of the template's."""

    def leaf(path, like):
        value = arrays[_name(path)]
        if _is_key(like):
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
        return value

    return jax.tree_util.tree_map_with_path(leaf, template)


def digest(arrays: dict[str, Any]) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def _file_checksums(directory: Path) -> dict[str, str]:
    """SHA-256 by name, of everything below a directory."""
    checksums = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            checksums[path.relative_to(directory).as_posix()] = checksum
    return checksums


def _free_name(path: Path) -> Path:
    names = itertools.chain(
        [path.name], (f"{path.name}-{i}" for i in itertools.count(2))
    )
    return next(p for p in map(path.with_name, names) if not p.exists())


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_data(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x
