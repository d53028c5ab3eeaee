"""Meshes of devices, made from text or with automatic axes."""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

BATCH_AXES = ("data", "fsdp")
"""Axes of a mesh over which a batch is split."""

_AXES = (*BATCH_AXES, "tensor")


def make_mesh(spec: str, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a mesh from text such as "data=4,fsdp=2", as a flag gives it.

    The last axis takes neighbouring devices, so the axis that communicates most is
    written last: `data=8,tensor=4`. For axes of other names there is `jax.make_mesh`.

    >>> make_mesh("data=-1").shape["data"] == jax.device_count()
    True

    Args:
      spec: axes with their sizes, `data` or `fsdp` among them, and `tensor`. One size
        may be -1, for all devices that the others leave.
      devices: the devices, those of all processes; `jax.devices()` if None. Where the
        mesh is smaller, it takes the first ones.

    Returns:
      A mesh with automatic axes.

    Raises:
      ValueError: for text of another form, an unknown axis, no axis that splits a
        batch, more devices than there are, or a process that would have none.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _fill(_parse(spec), spec, len(devices))
    num = math.prod(sizes.values())
    if num > len(devices):
        raise ValueError(
            f"the mesh {spec!r} has {num} devices, but there are {len(devices)}: make "
            "an axis smaller, or -1, which takes what is left. On a CPU, XLA_FLAGS="
            f"--xla_force_host_platform_device_count={num} makes virtual ones."
        )
    used = devices[:num]
    idle = {d.process_index for d in devices} - {d.process_index for d in used}
    if idle:
        raise ValueError(
            f"the mesh {spec!r} has {num} of the {len(devices)} devices of all "
            f"processes, and none of process {min(idle)}, which could take no step: "
            "make an axis larger, or -1, or start fewer processes."
        )
    return auto_mesh(jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=used))


def auto_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh with automatic axes, where XLA propagates the shardings.

    `jax.make_mesh` may give explicit axes, with which every contraction of a user's
    model would have to name its output sharding.
    """
    automatic = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=automatic)


def _parse(spec: str) -> dict[str, int]:
    """Returns the sizes of the axes as they are written, -1 included."""
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d*)\s*", part)
        if match is None:
            raise ValueError(
                f"a mesh is written as 'data=4,fsdp=2', where one size may be -1, got "
                f"{part!r} in {spec!r}."
            )
        name, size = match[1], int(match[2])
        if name not in _AXES:
            close = difflib.get_close_matches(name, _AXES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"the axes of a mesh are {', '.join(_AXES)}, got {name!r} in {spec!r}."
                f"{hint} jax.make_mesh makes a mesh with axes of other names."
            )
        if name in sizes:
            raise ValueError(f"the mesh {spec!r} names {name!r} twice; name it once.")
        sizes[name] = size
    if not sizes.keys() & set(BATCH_AXES):
        raise ValueError(
            f"a batch is split over 'data' or 'fsdp', but the mesh {spec!r} has "
            f"neither: write 'data=1,{spec}'."
        )
    return sizes


def _fill(sizes: dict[str, int], spec: str, num_devices: int) -> dict[str, int]:
    """Puts what is left of the devices in the place of a -1."""
    open_axes = [name for name, size in sizes.items() if size == -1]
    if not open_axes:
        return sizes
    if len(open_axes) > 1:
        raise ValueError(
            f"one size of a mesh may be -1, got {spec!r}; write the others as numbers."
        )
    taken = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % taken:
        raise ValueError(
            f"{num_devices} devices do not divide by {taken}, so nothing fits for -1 "
            f"in the mesh {spec!r}: choose sizes that divide {num_devices}."
        )
    return {**sizes, open_axes[0]: num_devices // taken}
