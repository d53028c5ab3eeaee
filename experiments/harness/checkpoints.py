"""Whole training states on disk, by orbax, each with a checksum of its own.

A state is stored as a flat dictionary of plain arrays by name, so that a checkpoint
does not depend on the classes that made it.
"""

import hashlib
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.errors import CheckpointError


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
        self._manager = self._open() if keep else None

    def save(self, step: int, state: Any) -> None:
        """Writes the state as it is after `step` steps; returns when it is on disk."""
        if self._manager is None or step in self._manager.all_steps():
            return
        arrays = to_arrays(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            meta=ocp.args.JsonSave({"sha256": digest(arrays)}),
        )
        self._manager.save(step, args=args, force=True)
        self._manager.wait_until_finished()

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """Reads the newest sound checkpoint; reports and sets aside damaged ones.

        Args:
          template: a state of the same structure, shapes and dtypes.

        Returns:
          The number of steps and the state; None if there is no checkpoint.

        Raises:
          CheckpointError: if there are checkpoints and none is sound.
        """
        if self._manager is None:
            return None
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self._read(step, template)
            except Exception as error:  # orbax and its readers raise anything
                damaged.append(step)
                self._set_aside(step, error)
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged (steps {damaged}); "
                "start again in another --workdir."
            )
        return None

    def close(self) -> None:
        """Ends orbax's threads."""
        if self._manager is not None:
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
        arrays = to_arrays(template)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(arrays), meta=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=args)
        if digest(restored["state"]) != restored["meta"]["sha256"]:
            raise ValueError("its content does not match its checksum")
        return from_arrays(template, restored["state"])

    def _set_aside(self, step: int, error: Exception) -> None:
        target = self.directory.parent / f"damaged-checkpoint-{step}"
        print(
            f"checkpoint {step} is damaged ({str(error).splitlines()[0][:200]}); moved "
            f"to {target}, trying the one before",
            file=sys.stderr,
            flush=True,
        )
        self.close()
        (self.directory / str(step)).rename(target)
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


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_data(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x
