"""Shardings of a train step's arrays on a mesh of devices.

Two axis names have a meaning: a batch is split over `data` and `fsdp`, parameters and
optimizer state over `fsdp` (ZeRO-3, arXiv:1910.02054) and replicated over all others.
"""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")
PARAM_AXIS = "fsdp"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis split over `data` and `fsdp`.

    Raises:
      ValueError: if the mesh has neither axis.
    """
    axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    if not axes:
        raise ValueError(
            f"the mesh has axes {mesh.axis_names}, but a batch is split over 'data' "
            "or 'fsdp'; make one with jax.make_mesh((jax.device_count(),), ('data',))."
        )
    return NamedSharding(auto_mesh(mesh), PartitionSpec(axes))


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a tree whose arrays are split over the `fsdp` axis.

    An array is split along the longest of its axes that the number of devices divides;
    small and odd-shaped arrays are replicated.

    Args:
      tree: arrays or shapes, such as a whole `TrainState`.
      mesh: the devices.

    Returns:
      A `NamedSharding` per leaf, in a tree like `tree`.
    """
    mesh = auto_mesh(mesh)
    size = mesh.shape.get(PARAM_AXIS, 1)

    def leaf_sharding(x):
        shape = getattr(x, "shape", ())
        axes = [axis for axis, n in enumerate(shape) if n % size == 0]
        if size == 1 or not axes or math.prod(shape) < 2 * size:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: shape[axis])
        spec: list[str | None] = [None] * len(shape)
        spec[longest] = PARAM_AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(leaf_sharding, tree)


def shard_state(state: Any, mesh: Mesh) -> Any:
    """Places a train state on the mesh as `make_train_step(mesh=mesh)` keeps it."""
    return jax.device_put(state, state_sharding(state, mesh))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a batch on the mesh, its first axis split over the devices.

    Raises:
      ValueError: if the mesh has neither a `data` nor an `fsdp` axis.
    """
    return jax.device_put(batch, batch_sharding(mesh))


def auto_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh with automatic axes, where XLA propagates the shardings.

    `jax.make_mesh` may give explicit axes, with which every contraction of a user's
    model would have to name its output sharding.
    """
    automatic = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=automatic)
