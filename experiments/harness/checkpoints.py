"""Training states on disk, by orbax, with checksums of arrays and files.

A state is stored as a flat dictionary of plain arrays by name, so that a checkpoint
does not depend on the classes that made it; beside it stands the position in the data.
Each process writes the parts of arrays that it has, and all together make one
checkpoint, which any number of devices and processes restores.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.harness.errors import CheckpointError, first_line
from experiments.harness.files import write_json
from experiments.harness.processes import first, largest


class Checkpoint(NamedTuple):
    """Contents of a checkpoint.

    Attributes:
      step: number of steps taken, skipped ones included.
      state: the `TrainState`.
      data_state: position in the training data, as JSON values.
    """

    step: int
    state: Any
    data_state: Any


class Checkpoints:
    """The newest checkpoints of one run; all processes make, use and close it."""

    def __init__(self, directory: Path, *, keep: int, read_only: bool = False):
        """Opens the directory, and makes it where there is none.

        Args:
          directory: holds the checkpoints of this run and nothing else.
          keep: how many to keep; 0 saves none.
          read_only: whether to change nothing; the directory must exist.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = directory.resolve()
        self.keep = keep
        self._read_only = read_only
        self._checksum_file = self.directory.with_name("checkpoints.json")
        self._manager = self._open() if keep else None

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Writes a checkpoint; returns when it is on disk.

        Args:
          step: number of steps taken.
          state: the `TrainState` after them.
          data_state: the position in the training data after them, as JSON values.

        Raises:
          CheckpointError: if it cannot be written; earlier checkpoints are kept.
        """
        if self._manager is None or first(lambda: step in self._steps_on_disk()):
            return
        arrays = to_arrays(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            meta=ocp.args.JsonSave(
                {"digest": _digest(arrays, data_state), "data_state": data_state}
            ),
        )
        try:
            # Checked first, because orbax's threads report a full disk at length.
            free_bytes = first(lambda: shutil.disk_usage(self.directory).free)
            if free_bytes < sum(array.nbytes for array in arrays.values()):
                raise OSError(f"{free_bytes / 2**20:.1f} MiB are free on the disk")
            self._manager.save(step, args=args, force=True)
            self._manager.wait_until_finished()
            first(self._write_checksums)
        except Exception as error:  # orbax and its writers raise anything
            if jax.process_count() > 1 and not isinstance(error, OSError):
                raise  # as where another process is gone
            raise CheckpointError(
                f"cannot write checkpoint {step} to {self.directory}: "
                f"{first_line(error)}. Free some space, or make it writable, then "
                "continue with --resume; earlier checkpoints are kept."
            ) from error

    def restore(self, template: Any) -> Checkpoint | None:
        """Reads the newest intact checkpoint; reports and sets aside damaged ones.

        Where none is intact, or if nothing may be changed, they stay where they are.

        Args:
          template: a state of the same structure, shapes and dtypes; None for the
            arrays by name (see `to_arrays`), in NumPy, whatever they are.

        Returns:
          The checkpoint; None if there is none.

        Raises:
          CheckpointError: if there are checkpoints and none is intact, or if the newest
            is of a version whose checkpoints this one cannot check.
        """
        if self._manager is None:
            return None
        damaged: dict[int, str] = {}
        for step in sorted(first(self._steps_on_disk), reverse=True):
            checkpoint, damage = self._try(step, template)
            if checkpoint is None:
                damaged[step] = damage
                continue
            self._set_aside(damaged, step)
            return checkpoint
        if damaged:
            steps = ", ".join(map(str, damaged))
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged (steps {steps}; "
                f"{next(iter(damaged.values()))}). Put a copy of one there, or start "
                "again in another --workdir."
            )
        return None

    def close(self) -> None:
        """Ends orbax's threads; `save` has reported what they could not write."""
        if self._manager is not None:
            with contextlib.suppress(Exception):
                self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if self._read_only else self.keep,
            cleanup_tmp_directories=not self._read_only,
            enable_async_checkpointing=False,
            read_only=self._read_only,
        )
        # Only for what is in a checkpoint of unknown content.
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers=handlers if self._read_only else None,
        )

    def _try(self, step: int, template: Any) -> tuple[Checkpoint | None, str]:
        """Returns a checkpoint, or None and what is wrong, alike in all processes."""
        restored, damage = None, first(lambda: self._damaged_file(step))
        if damage is None:
            try:
                restored = self._read(step, template)
            except Exception as error:  # orbax and its readers raise anything
                damage = first_line(error)
        if largest(restored is None):
            return None, damage or "another process cannot read it"
        assert restored is not None
        arrays, meta = restored
        if not self._is_right(step, arrays, meta):
            return None, "its content does not match its checksum"
        state = arrays if template is None else from_arrays(template, arrays)
        return Checkpoint(step, state, meta["data_state"]), ""

    def _read(self, step: int, template: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the arrays of a checkpoint, and what stands beside them.

        It is read by handlers and not by the manager, whose `restore` waits for all
        processes at its end, also for one that could not read.
        """
        like = self._stored(step) if template is None else to_arrays(template)
        directory: Any = self.directory / str(step)
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            args = ocp.args.StandardRestore(like)
            arrays = handler.restore(directory / "state", args=args)
        with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
            meta = handler.restore(directory / "meta", args=ocp.args.JsonRestore())
        return arrays, dict(meta)

    def _is_right(
        self, step: int, arrays: dict[str, Any], meta: dict[str, Any]
    ) -> bool:
        """Compares what was read with its checksum.

        Raises:
          CheckpointError: if it is of a version that this one cannot check.
        """
        if meta.keys() == {"digest", "data_state"}:
            return _digest(arrays, meta["data_state"]) == meta["digest"]
        if meta.keys() == {"sha256", "data_state"} and jax.process_count() == 1:
            text = json.dumps(meta["data_state"], sort_keys=True)
            state = {"data_state": np.frombuffer(text.encode(), np.uint8)}
            return digest({**arrays, **state}) == meta["sha256"]
        raise CheckpointError(
            f"checkpoint {step} in {self.directory} is of an older version, which this "
            "one cannot check; finish the run with that version, or start again in "
            "another --workdir."
        ).everywhere()

    def _stored(self, step: int) -> dict[str, np.ndarray]:
        """Returns empty arrays of the names, shapes and dtypes of a checkpoint."""
        assert self._manager is not None
        stored = self._manager.item_metadata(step)["state"]
        return {name: np.empty(like.shape, like.dtype) for name, like in stored.items()}

    def _write_checksums(self) -> None:
        """Writes the checksums of every checkpoint's files, beside the directory."""
        existing = self._checksums()
        names = [str(step) for step in self._steps_on_disk()]
        checksums = {
            name: existing.get(name) or _file_checksums(self.directory / name)
            for name in names
        }
        write_json(self._checksum_file, checksums)

    def _damaged_file(self, step: int) -> str | None:
        """Finds a damaged file before orbax's threads do, which report it at length."""
        expected = self._checksums().get(str(step), {})
        try:
            got = _file_checksums(self.directory / str(step))
        except OSError as error:
            return first_line(error)
        for name, checksum in expected.items():
            if got.get(name) != checksum:
                what = "is changed" if name in got else "is missing"
                return f"its file {name} {what}"
        return None

    def _checksums(self) -> dict[str, dict[str, str]]:
        """Returns checksums by step and file; none if they were never written."""
        try:
            return json.loads(self._checksum_file.read_text())
        except (OSError, ValueError):
            return {}

    def _steps_on_disk(self) -> list[int]:
        """Returns every finished checkpoint, those included that orbax has not seen."""
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        return [int(name) for name in names if name.isdigit()]

    def _set_aside(self, damaged: dict[int, str], intact: int) -> None:
        if not damaged:
            return
        if self._read_only:
            for step, reason in damaged.items():
                text = f"checkpoint {step} is damaged ({reason}); using {intact}"
                print(text, file=sys.stderr, flush=True)
            return
        self.close()
        first(lambda: self._move(damaged, intact))
        self._manager = self._open()

    def _move(self, damaged: dict[int, str], intact: int) -> None:
        for step, reason in damaged.items():
            target = _free_name(self.directory.parent / f"damaged-checkpoint-{step}")
            (self.directory / str(step)).rename(target)
            self._write_checksums()
            print(
                f"checkpoint {step} is damaged ({reason}); moved to {target}, "
                f"continuing from checkpoint {intact}",
                file=sys.stderr,
                flush=True,
            )


def to_arrays(state: Any) -> dict[str, Any]:
    """Returns the leaves of a state by name; PRNG keys as their data."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): _to_data(leaf) for path, leaf in leaves}


def from_arrays(template: Any, arrays: dict[str, Any]) -> Any:
    """Rebuilds a state; every leaf has the dtype and sharding of the template's."""

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


def _digest(arrays: dict[str, Any], data_state: Any) -> str:
    """Returns the SHA-256 of names, dtypes, shapes, checksums and a position.

    It does not depend on how the arrays lie on devices; all processes call it.
    """
    sums = jax.device_get(_checksums({k: _in_32_bits(x) for k, x in arrays.items()}))
    lines = [
        f"{name} {x.dtype} {x.shape} {int(sums[name])}"
        for name, x in sorted(arrays.items())
    ]
    lines.append(json.dumps(data_state, sort_keys=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _in_32_bits(x: Any) -> Any:
    """Returns the words of a NumPy array of 64 bits, which JAX may not have."""
    is_wide = (
        isinstance(x, np.ndarray) and x.dtype.itemsize == 8 and x.dtype.kind != "c"
    )
    return np.ascontiguousarray(x).reshape(-1).view(np.uint32) if is_wide else x


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns a checksum of the bits of each array, uint32, exact in any order.

    It is the sum of a hash of each word of 32 bits and its place: MurmurHash3's final
    mix (Austin Appleby, 2011), in which each bit depends on all.
    """
    return jax.tree.map(_checksum, arrays)


def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    bits = jnp.dtype(x.dtype).itemsize * 8
    words = jax.lax.bitcast_convert_type(x, f"uint{min(bits, 32)}").astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * jnp.uint32(size) + index
    mixed = _mix(words ^ _mix(place + jnp.uint32(1)))
    return jnp.sum(mixed, dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _file_checksums(directory: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below a directory, by name."""
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
