"""Compiling a function for a device of this machine, or for a GPU you don't have."""

import functools
import importlib.util
from typing import Any

import jax
from jax.experimental import topologies

from mpjax._report import first_line
from mpjax.cost._devices import Device

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class CompileError(RuntimeError):
    """A step cannot be compiled for a GPU here; the message says what to do."""


class MissingPluginError(CompileError):
    """JAX's CUDA plugin, which compiles for a GPU, is not installed or does not start.

    The message says what to do.
    """


def compile_for(device: Device, step: Any, *args: Any) -> Any:
    """Compiles a function without running it.

    Args:
      device: the GPU that `device.target` describes, or JAX's default device if that is
        None.
      step: a function, jitted or not; donation and other settings of jit are kept.
      *args: its arguments; arrays, `jax.ShapeDtypeStruct` or numbers.

    Returns:
      A `jax.stages.Compiled`.

    Raises:
      MissingPluginError: if the CUDA plugin is not installed or does not start.
      CompileError: if XLA cannot compile the function for that GPU.
    """
    jitted = step if hasattr(step, "lower") else jax.jit(step)
    if device.target is None:
        return jitted.lower(*args).compile()
    sharding = jax.sharding.SingleDeviceSharding(_gpu(device))

    def to_struct(x):
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return x

    lowered = jitted.lower(*jax.tree.map(to_struct, args))
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


def _gpu(device: Device) -> Any:
    if not any(map(importlib.util.find_spec, _PLUGINS)):
        raise MissingPluginError(
            f"compiling for {device.name} needs JAX's CUDA plugin, but no GPU: "
            'pip install "jax[cuda13]"'
        )
    try:
        return _topology(target_config(device)).devices[0]
    except RuntimeError as error:
        raise MissingPluginError(
            f"JAX's CUDA plugin did not start ({first_line(error)}). On a machine "
            "without a GPU, set JAX_PLATFORMS=cpu before JAX computes anything: "
            'jax.config.update("jax_platforms", "cpu").'
        ) from error


@functools.lru_cache(maxsize=8)
def _topology(config: str) -> Any:
    return topologies.get_topology_desc(
        "mpjax", "cuda", target_config=config, topology="1x1x1"
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
