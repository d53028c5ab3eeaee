"""Compiling a function for devices of this machine, or for GPUs you don't have."""

import functools
import importlib.util
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from mpjax._autocast.float8_devices import tracing_for
from mpjax._report import first_line
from mpjax.cost._devices import Device, get_device
from mpjax.cost._mesh import choose_mesh, is_absent, place_args

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class CompileError(RuntimeError):
    """A step cannot be compiled for a GPU here; the message says what to do."""


class MissingPluginError(CompileError):
    """JAX's CUDA plugin, which compiles for a GPU, is not installed or does not start.

    The message says what to do.
    """


def device_mesh(device: str | Device, axes: Mapping[str, int]) -> Mesh:
    """Returns a mesh of GPUs that you don't have, to compile for.

    It takes a GPU and the size of each axis, `device_mesh("h100", {"data": 64, "fsdp":
    8})`, and returns the mesh. `make_train_step` takes it like any other, and `analyze`
    tells what the step costs; nothing can run on it.

    The devices are numbered node by node, and the last axis varies fastest: of 64 x 8,
    those that differ in `fsdp` alone share a node of eight GPUs.

    Args:
      device: "v100", "a100", "h100", "h200", "b200", or a `Device` with a `target`.
      axes: sizes by name; a batch is split over `data` and `fsdp`, see
        `mpjax.sharding`.

    Returns:
      A mesh with automatic axes.

    Raises:
      ValueError: for an unknown device, one without a `target`, no axes, or a size that
        is not a whole number of at least 1.
      MissingPluginError: if the CUDA plugin is not installed or does not start; it says
        what to do.
    """
    target = get_device(device)
    sizes = tuple(axes.values())
    if not axes or not all(isinstance(n, numbers.Integral) and n > 0 for n in sizes):
        raise ValueError(
            "expected the size of each axis, whole numbers of at least 1, such as "
            f'{{"data": 64, "fsdp": 8}}, got {dict(axes)}.'
        )
    if target.target is None:
        raise ValueError(
            f"{target.name} has no target to compile for: pass the name of a GPU, such "
            'as "h100", or a Device with a target. A mesh of devices that are here is '
            "made by jax.make_mesh."
        )
    gpus = _gpus(target, math.prod(sizes))
    return Mesh(
        np.array(gpus).reshape(sizes),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
    )


def compile_for(device: Device, step: Any, *args: Any) -> Any:
    """Compiles a function without running it.

    Args:
      device: what to compile for: the mesh of the step or of its arguments, if these
        are such devices; otherwise the GPU that `device.target` describes, or JAX's
        default device if that is None.
      step: a function, jitted or not; donation and other settings of jit are kept.
      *args: its arguments; arrays, `jax.ShapeDtypeStruct` or numbers.

    Returns:
      A `jax.stages.Compiled`.

    Raises:
      ValueError: if the step's mesh is of other devices.
      MissingPluginError: if the CUDA plugin is not installed or does not start.
      CompileError: if XLA cannot compile the function for that GPU.
    """
    jitted = step if hasattr(step, "lower") else jax.jit(step)
    mesh = choose_mesh(device, step, args)
    if mesh is not None:
        args = place_args(step, args, mesh)
    elif device.target is not None:
        args = _place_on_one(_gpus(device, 1)[0], args)
    with tracing_for(another_device=device.target is not None):
        lowered = jitted.lower(*args)
    if device.target is None and (mesh is None or not is_absent(mesh)):
        return lowered.compile()
    # Autotuning would time kernels on the GPU.
    options: Any = {"xla_gpu_autotune_level": 0}
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        raise CompileError(
            f"XLA cannot compile for {device.name} with this CUDA: {first_line(error)}"
            f"{_hint(device)}"
        ) from error


def peak_bytes(compiled: Any) -> int:
    """Returns the bytes needed at once: arguments, temporaries and other results."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _place_on_one(gpu: Any, args: tuple) -> tuple:
    sharding = jax.sharding.SingleDeviceSharding(gpu)

    def to_struct(x):
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return x

    return jax.tree.map(to_struct, args)


def _gpus(device: Device, num_devices: int) -> list[Any]:
    if not any(map(importlib.util.find_spec, _PLUGINS)):
        raise MissingPluginError(
            f"compiling for {device.name} needs JAX's CUDA plugin, but no GPU: "
            'pip install "jax[cuda13]"'
        )
    try:
        return _topology(target_config(device), num_devices).devices
    except RuntimeError as error:
        raise MissingPluginError(
            f"JAX's CUDA plugin did not start ({first_line(error)}). On a machine "
            "without a GPU, set JAX_PLATFORMS=cpu before JAX computes anything: "
            'jax.config.update("jax_platforms", "cpu").'
        ) from error


@functools.lru_cache(maxsize=8)
def _topology(config: str, num_devices: int) -> Any:
    return topologies.get_topology_desc(
        "mpjax", "cuda", target_config=config, topology=f"1x1x{num_devices}"
    )


def target_config(device: Device) -> str:
    """Returns XLA's GpuTargetConfigProto of a GPU, as text."""
    target = {
        **(device.target or {}),
        "memory_bandwidth": int(device.bandwidth_bytes_per_s or 0),
        "device_memory_size": device.memory_bytes,
    }
    cuda = 13 if importlib.util.find_spec("jax_cuda13_plugin") else 12
    return "\n".join(
        [
            f"gpu_device_info {{ {_fields(target)} }}",
            f"runtime_version {{ major: {cuda} }}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            f'device_description_str: "{device.device_kind}"',
        ]
    )


def _fields(values: dict[str, Any]) -> str:
    return " ".join(
        f"{name} {{ {_fields(value)} }}"
        if isinstance(value, dict)
        else f"{name}: {value}"
        for name, value in values.items()
    )


def _hint(device: Device) -> str:
    capability = (device.target or {}).get("cuda_compute_capability", {})
    if capability.get("major", 9) < 8 and not importlib.util.find_spec(
        "jax_cuda12_plugin"
    ):
        return '; CUDA 13 has dropped GPUs before Turing: pip install "jax[cuda12]".'
    return "."
