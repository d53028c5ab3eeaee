"""Trained weights as a safetensors file, verified when it is read."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from experiments.harness.checkpoints import digest
from experiments.harness.errors import ExperimentError
from experiments.harness.files import atomic_write


class WeightsError(ExperimentError):
    """A file of weights that is damaged or belongs to another network."""


def write_weights(path: Path, params: Any, *, architecture: str) -> None:
    """Writes weights atomically, in float32, under names such as `Conv_0.kernel`.

    Args:
      path: the file to write or replace.
      params: nested dictionaries of arrays, in float32 or half.
      architecture: name of the network; the metadata hold it and a checksum.

    Raises:
      OSError: if the file cannot be written; an existing one is kept.
    """
    flat = flatten_dict(jax.device_get(params), sep=".")
    arrays = {k: np.ascontiguousarray(v, np.float32) for k, v in flat.items()}
    metadata = {"architecture": architecture, "sha256": digest(arrays)}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(arrays, metadata))


def read_weights(path: Path, template: Any) -> Any:
    """Reads the weights of a network.

    Args:
      path: a file from `write_weights`, or any safetensors file with the same names.
      template: nested dictionaries of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The template's dictionaries with NumPy float32 arrays.

    Raises:
      WeightsError: if the file cannot be read, is damaged, or has other names, shapes
        or dtypes.
    """
    leaves: dict[str, Any] = dict(flatten_dict(template, sep="."))
    expected = {name: (tuple(leaf.shape), "F32") for name, leaf in leaves.items()}
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {
                name: (tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
            _compare(path, found, expected, file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in expected}
            checksum = (file.metadata() or {}).get("sha256")
    except OSError as error:
        reason = error.strerror or str(error)
        raise WeightsError(
            f"cannot read the weights in {path}: {reason}. Name a file that --export "
            "wrote, or weights.safetensors in a run's directory."
        ) from error
    except SafetensorError as error:
        raise _damaged(path, f"it is not a whole safetensors file: {error}") from error
    if checksum not in (None, digest(arrays)):
        raise _damaged(path, "its content does not match its checksum")
    return unflatten_dict(arrays, sep=".")


def _compare(path: Path, found: Any, expected: Any, metadata: dict[str, str]) -> None:
    """Raises WeightsError if names, shapes or dtypes differ; lists the differences."""
    differences = [
        f"{name} is {_text(found, name)} there, expected {_text(expected, name)}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if not differences:
        return
    more = len(differences) - 3
    listed = "; ".join(differences[:3]) + (f"; and {more} more" if more > 0 else "")
    raise WeightsError(
        f"the weights in {path} are not this network's "
        f"(architecture there: {metadata.get('architecture', 'not named')}): {listed}. "
        "Name a file that --export wrote."
    )


def _text(entries: dict[str, tuple[tuple[int, ...], str]], name: str) -> str:
    if name not in entries:
        return "absent"
    shape, dtype = entries[name]
    return f"{dtype} {shape}"


def _damaged(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"the weights in {path} are damaged: {reason}. Take an intact copy of the "
        "file, or export it again from the run with --resume --export."
    )
