"""The mesh that a step runs on, and its arguments placed on it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from mpjax.cost._devices import Device, find_device, get_device
from mpjax.sharding import auto_mesh, batch_sharding, state_sharding


def find_mesh(step: Any, args: Any) -> Mesh | None:
    """Returns the mesh of a step, or of its sharded arguments; None if there is none.

    Args:
      step: one of `make_train_step` has its mesh as `step.mesh`.
      args: its arguments, or any tree of arrays, shapes or shardings.
    """
    mesh = getattr(step, "mesh", None)
    shardings = (getattr(x, "sharding", x) for x in jax.tree.leaves(args))
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    found = next((m for m in (mesh, *meshes) if isinstance(m, Mesh)), None)
    return None if found is None else auto_mesh(found)


def choose_device(device: str | Device | None, step: Any, args: Any) -> Device:
    """Returns a device by name; None is that of the mesh, or JAX's default device."""
    mesh = find_mesh(step, args)
    if device is not None or mesh is None:
        return get_device(device)
    found = find_device(mesh.devices.flat[0].device_kind)
    return found if is_absent(mesh) else dataclasses.replace(found, target=None)


def choose_mesh(device: Device, step: Any, args: Any) -> Mesh | None:
    """Returns the mesh to compile a function for; None for a single device.

    Raises:
      ValueError: if `device` has a target, and the step's mesh is of other devices.
    """
    mesh = find_mesh(step, args)
    if mesh is None or device.target is None:
        return mesh
    kind = mesh.devices.flat[0].device_kind
    if is_absent(mesh) and kind == device.device_kind:
        return mesh
    if not is_absent(mesh) and getattr(step, "mesh", None) is None:
        return None  # Arrays that happen to lie on a mesh of this machine.
    raise ValueError(
        f"the mesh is of devices of the kind {kind!r}, not of {device.name}: leave out "
        "device=, or make the step for another mesh, mesh=mpjax.cost.device_mesh(...)."
    )


def is_absent(mesh: Mesh) -> bool:
    """Whether a mesh is of devices that one can only compile for (`device_mesh`)."""
    return mesh.devices.flat[0].client.runtime_type == "compile_only_runtime"


def place_args(step: Any, args: tuple, mesh: Mesh) -> tuple:
    """Returns the shapes of a step's arguments, with their shardings on a mesh.

    What is sharded by names of axes stays so. Of a step with a mesh, the rest of the
    state is placed by `state_sharding` with the step's layout, and that of the batch by
    `batch_sharding`; the rest of other functions' arguments is left to XLA.
    """
    defaults: Any = jax.tree.map(lambda _: None, args)
    if getattr(step, "mesh", None) is not None:
        state, *batches = args
        rest = jax.tree.map(lambda _: batch_sharding(mesh), batches)
        layout = getattr(step, "layout", None)
        defaults = state_sharding(state, mesh, layout=layout), *rest

    def place(x, default):
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            return x
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            default = NamedSharding(mesh, sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=default)

    return jax.tree.map(place, args, defaults)


def describe_mesh(axes: Mapping[str, int]) -> str:
    """Returns the sizes of a mesh's axes as text, `data=64 x fsdp=8`."""
    return " x ".join(f"{name}={size}" for name, size in axes.items())


def num_sharing(args: Any, mesh: Mesh | None) -> int:
    """Returns how many devices share the work: those along axes that split an argument.

    Args:
      args: as `place_args` returns them.
      mesh: the mesh; None for a single device.
    """
    if mesh is None:
        return 1
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(args)]
    specs = [tuple(s.spec) for s in shardings if isinstance(s, NamedSharding)]
    return math.prod(mesh.shape[axis] for axis in set(jax.tree.leaves(specs)))
