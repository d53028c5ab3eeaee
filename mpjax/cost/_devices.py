"""Devices: what they hold, how fast they are, and what XLA must know to compile."""

import dataclasses
import functools
import tomllib
from importlib import resources
from typing import Any

import jax

_FOLDER = resources.files("mpjax.cost") / "devices"


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, as the data files in `mpjax/cost/devices` have it, or as you say.

    Attributes:
      name: for people.
      memory_bytes: of the device, or None if not known.
      bandwidth_bytes_per_s: of its memory, or None.
      peak_flops_per_s: by dtype; `tf32` and the half formats on matrix units, dense;
        `float8` likewise. `float32` and `float64` without matrix units.
      target: fields of XLA's GpuDeviceInfoProto, by which code is compiled for it; None
        for the device that is here.
      device_kind: what JAX calls it.
    """

    name: str
    memory_bytes: int | None = None
    bandwidth_bytes_per_s: float | None = None
    peak_flops_per_s: dict[str, float] = dataclasses.field(default_factory=dict)
    target: dict[str, Any] | None = None
    device_kind: str = ""

    def matmul_flops_per_s(self, dtype: str, float32_matmul_precision: str) -> Any:
        """Returns the peak of matmuls in a dtype, None if not known.

        Args:
          dtype: of the operands. One that the device's matrix units do not take runs at
            the peak of float32.
          float32_matmul_precision: as `jax_default_matmul_precision`; float32 matmuls
            run in TF32, where the device has it, unless it is "highest" or "float32".
        """
        peak = self.peak_flops_per_s
        if dtype.startswith("float8"):
            return peak.get("float8") or peak.get("float16") or peak.get("float32")
        if dtype == "float32" and float32_matmul_precision not in (
            "highest",
            "float32",
        ):
            return peak.get("tf32") or peak.get("float32")
        return peak.get(dtype) or peak.get("float32")

    def vector_flops_per_s(self, dtype: str) -> Any:
        """Returns the peak of all but matmuls in a dtype, None if not known."""
        return self.peak_flops_per_s.get("float64" if dtype == "float64" else "float32")


def device_names() -> list[str]:
    """Returns the names of the devices with a data file."""
    return sorted(
        path.name.removesuffix(".toml")
        for path in _FOLDER.iterdir()
        if path.name.endswith(".toml")
    )


def get_device(device: str | Device | None) -> Device:
    """Returns a device by name, such as "h100"; None is JAX's default device.

    Of a present device that has no data file, such as a CPU, memory, bandwidth and
    peaks are not known.

    Raises:
      ValueError: if there is no such name; it lists those there are.
    """
    if isinstance(device, Device):
        return device
    if device is None:
        return _present(jax.devices()[0].device_kind)
    if device.lower() not in device_names():
        raise ValueError(
            f"unknown device {device!r}; known are {', '.join(device_names())}. For "
            "another, pass mpjax.cost.Device(...)."
        )
    return _read(device.lower())


def _present(device_kind: str) -> Device:
    for name in device_names():
        if _read(name).device_kind == device_kind:
            return dataclasses.replace(_read(name), target=None)
    return Device(name=device_kind, device_kind=device_kind)


@functools.cache
def _read(name: str) -> Device:
    data = tomllib.loads((_FOLDER / f"{name}.toml").read_text())
    peak = {k: v for k, v in data["peak_flops_per_s"].items() if k != "source"}
    return Device(
        name=data["name"],
        memory_bytes=data["memory_bytes"],
        bandwidth_bytes_per_s=data["bandwidth_bytes_per_s"],
        peak_flops_per_s=peak,
        target=data["target"],
        device_kind=data["device_kind"],
    )
