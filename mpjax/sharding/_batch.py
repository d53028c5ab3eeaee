"""A batch split over the devices of a mesh, in one process or several."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpjax._tree import path_name
from mpjax.sharding._mesh import BATCH_AXES, auto_mesh
from mpjax.sharding._place import host_value, place


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis split over `data` and `fsdp`.

    Raises:
      ValueError: if the mesh has neither axis.
    """
    axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    if not axes:
        raise ValueError(
            f"the mesh has axes {mesh.axis_names}, but a batch is split over 'data' "
            "or 'fsdp'; make one with mpjax.sharding.make_mesh('data=-1')."
        )
    return NamedSharding(auto_mesh(mesh), PartitionSpec(axes))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a whole batch on the mesh, its first axis split over the devices.

    Where the mesh spans processes, each of them passes the same whole batch, and keeps
    its part. A process that has read examples of its own passes them to `global_batch`.

    Args:
      batch: arrays (B, ...), where B counts the examples of all devices.
      mesh: the devices.

    Raises:
      ValueError: if the mesh has neither a `data` nor an `fsdp` axis, or B does not
        divide by their devices.
    """
    sharding = batch_sharding(mesh)
    check_batch(batch, mesh)
    return jax.tree.map(lambda x: place(x, sharding), batch)


def global_batch(batch: Any, mesh: Mesh, *, batch_size: int | None = None) -> Any:
    """Makes one batch for the mesh of the examples that each process has read.

    Process after process, in the order of the mesh, has its part of the first axis.
    Nothing is sent. In one process this is `shard_batch`.

    Args:
      batch: arrays (b, ...), where b counts the examples of this process. Processes
        whose devices hold the same part, as where `tensor` spans them, pass the same
        examples.
      mesh: the devices, of all processes.
      batch_size: examples of all processes, to be checked against b; None infers them,
        and takes b to be right. A process with another b than its like, as at the end
        of an epoch, is found only where it is given.

    Returns:
      Arrays (B, ...) on the mesh, where B counts the examples of all processes.

    Raises:
      ValueError: if the mesh has neither a `data` nor an `fsdp` axis, or b is not what
        the devices of this process need.
    """
    sharding = batch_sharding(mesh)
    num_parts, num_own = _num_parts(mesh), len(_own_parts(mesh))
    where = (
        f"the mesh {dict(mesh.shape)} splits a batch into {num_parts} parts, {num_own} "
        f"of them in process {jax.process_index()}"
    )
    if batch_size is not None and batch_size % num_parts:
        raise ValueError(
            f"{where}, got batch_size={batch_size}: make it a multiple of {num_parts}."
        )

    def make(path, x):
        x = host_value(x)
        size = x.shape[0] if x.ndim else 0
        if batch_size is None:
            expected, is_right = f"a multiple of {num_own}", size % num_own == 0
        else:
            expected = batch_size // num_parts * num_own
            is_right = size == expected
        if not x.ndim or not is_right:
            raise ValueError(
                f"{where}, so batch/{path_name(path)} must have {expected} examples "
                f"there, got shape {x.shape}: give each process its share, and drop or "
                "pad what is left at the end of an epoch."
            )
        shape = (size // num_own * num_parts, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree_util.tree_map_with_path(make, batch)


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Returns which part of every batch this process reads, for `global_batch`.

    Processes whose devices hold the same part, as where `tensor` spans them, have the
    same share.

    Args:
      mesh: the devices, of all processes.

    Returns:
      A pair of index and count: of a batch in `count` equal blocks of examples, this
      process reads block number `index`.

    Raises:
      ValueError: if the mesh has no device of this process, or those it has are no
        such block.
    """
    num_parts, own = _num_parts(mesh), _own_parts(mesh)
    num_own = len(own)
    count, remainder = divmod(num_parts, num_own)
    if remainder or own[0] % num_own or own[-1] - own[0] != num_own - 1:
        raise ValueError(
            f"of the {num_parts} parts of a batch on the mesh {dict(mesh.shape)}, "
            f"process {jax.process_index()} holds {own}, which are no equal block: "
            "order the devices of the mesh by process, as make_mesh does."
        )
    return own[0] // num_own, count


def check_batch(batch: Any, mesh: Mesh) -> None:
    """Raises ValueError unless every array of a batch can be split over the mesh.

    Args:
      batch: arrays or shapes (B, ...).
      mesh: the devices.
    """
    num_parts = _num_parts(mesh)
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        shape = np.shape(x)
        if not shape or shape[0] % num_parts:
            raise ValueError(
                f"the mesh {dict(mesh.shape)} splits the first axis of a batch over "
                f"{num_parts} devices, but batch/{path_name(path)} has shape {shape}: "
                f"make it a multiple of {num_parts}, and drop or pad what is left at "
                "the end of an epoch."
            )


def _num_parts(mesh: Mesh) -> int:
    return math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)


def _own_parts(mesh: Mesh) -> list[int]:
    """Returns the numbers of the parts of a batch that devices of this process hold.

    Raises:
      ValueError: if the mesh has none of its devices.
    """
    shape = (_num_parts(mesh),)
    indices = batch_sharding(mesh).addressable_devices_indices_map(shape).values()
    own = sorted({index[0].start or 0 for index in indices if index is not None})
    if not own:
        raise ValueError(
            f"process {jax.process_index()} has no device of the mesh "
            f"{dict(mesh.shape)}: make the mesh larger, or start fewer processes."
        )
    return own
