"""Compiling a function for the device that is here, or for a GPU that is not."""

import functools
import importlib.util
from typing import Any

import jax
from jax.experimental import topologies

from mpjax.cost._devices import Device

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class CompileError(RuntimeError):
    """A step cannot be compiled for a device here; the message says what to do."""


def compile_for(device: Device, step: Any, *args: Any) -> Any:
    """Compiles without running.

    Args:
      device: where `target` is None, JAX's default device, else the GPU so described.
      step: a function, jitted or not; what jit was told (donation) counts.
      args: its arguments; arrays, `jax.ShapeDtypeStruct` or numbers.

    Returns:
      A `jax.stages.Compiled`.

    Raises:
      CompileError: if code for that GPU cannot be made here; it says what to do.
    """
    jitted = step if hasattr(step, "lower") else jax.jit(step)
    if device.target is None:
        return jitted.lower(*args).compile()
    sharding = jax.sharding.SingleDeviceSharding(_gpu(device))

    def place(x):
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return x

    lowered = jitted.lower(*jax.tree.map(place, args))
    # Choosing kernels by timing them needs the GPU.
    options: Any = {"xla_gpu_autotune_level": 0}
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        raise CompileError(
            f"XLA cannot compile for {device.name} with this CUDA: {_first_line(error)}"
            f"{_hint(device)}"
        ) from error


def peak_bytes(compiled: Any) -> int:
    """Returns what must fit at once: arguments, other results, temporaries."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _gpu(device: Device) -> Any:
    if not any(map(importlib.util.find_spec, _PLUGINS)):
        raise CompileError(
            f"compiling for {device.name} needs JAX's CUDA plugin, though no GPU: "
            'pip install "jax[cuda13]"'
        )
    try:
        return _topology(target_config(device)).devices[0]
    except (NotImplementedError, jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise CompileError(
            f"JAX's CUDA plugin did not start ({_first_line(error)}). Where there is "
            "no GPU, set JAX_PLATFORMS=cpu before JAX computes anything: "
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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _hint(device: Device) -> str:
    capability = (device.target or {}).get("cuda_compute_capability", {})
    if capability.get("major", 9) < 8 and not importlib.util.find_spec(
        "jax_cuda12_plugin"
    ):
        return '; CUDA 13 has dropped GPUs before Turing: pip install "jax[cuda12]".'
    return "."
