"""Devices: their memory and peaks, and the description that XLA compiles for."""

import dataclasses
import functools
import tomllib
from importlib import resources
from typing import Any

import jax

_FOLDER = resources.files("mpjax.cost") / "devices"


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, from a data file in `mpjax/cost/devices` or of your own numbers.

    Attributes:
      name: name in reports.
      memory_bytes: memory of the device; None if unknown.
      bandwidth_bytes_per_s: bandwidth of its memory; None if unknown.
      peak_flops_per_s: FLOP/s by dtype: `tf32`, `float16`, `bfloat16` and `float8` on
        matrix units, without sparsity; `float32` and `float64` on vector units.
      target: fields of XLA's GpuDeviceInfoProto to compile for; None for a device of
        this machine.
      device_kind: JAX's name for it, `jax.Device.device_kind`.
      num_per_node: number of devices in a node; None if unknown.
      node_bandwidth_bytes_per_s: what a device sends at most to others of its node, by
        NVLink; what it receives at the same time does not count. None if unknown.
      network_bandwidth_bytes_per_s: likewise to other nodes, by its share of the node's
        network adapters.
    """

    name: str
    memory_bytes: int | None = None
    bandwidth_bytes_per_s: float | None = None
    peak_flops_per_s: dict[str, float] = dataclasses.field(default_factory=dict)
    target: dict[str, Any] | None = None
    device_kind: str = ""
    num_per_node: int | None = None
    node_bandwidth_bytes_per_s: float | None = None
    network_bandwidth_bytes_per_s: float | None = None

    def matmul_flops_per_s(self, dtype: str, float32_matmul_precision: str) -> Any:
        """Returns the peak FLOP/s of matmuls in a dtype; None if unknown.

        Args:
          dtype: dtype of the operands. A dtype that the device's matrix units do not
            take runs at the peak of float32.
          float32_matmul_precision: as `jax_default_matmul_precision`. Unless it is
            "highest" or "float32", float32 matmuls run in TF32 on a device that has it.
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
        """Returns the peak FLOP/s of other operations in a dtype; None if unknown."""
        return self.peak_flops_per_s.get("float64" if dtype == "float64" else "float32")

    def link_bytes_per_s(self, num_nodes: int, num_sharing: int) -> float | None:
        """Returns how fast a device sends in a collective; None if unknown.

        Args:
          num_nodes: number of nodes that the collective connects.
          num_sharing: number of devices of a node that share what leaves it.
        """
        node, network = (
            self.node_bandwidth_bytes_per_s,
            self.network_bandwidth_bytes_per_s,
        )
        if num_nodes == 1 or node is None or network is None:
            return node if num_nodes == 1 else None
        return min(node, num_sharing * network)


def device_names() -> list[str]:
    """Returns the names of the devices that have a data file."""
    return sorted(
        path.name.removesuffix(".toml")
        for path in _FOLDER.iterdir()
        if path.name.endswith(".toml")
    )


def get_device(device: str | Device | None) -> Device:
    """Returns a device by name, such as "h100"; None is JAX's default device.

    The memory, bandwidth and peaks of a device without a data file, such as a CPU, are
    None.

    Raises:
      ValueError: if the name is unknown; the message lists the known names.
    """
    if isinstance(device, Device):
        return device
    if device is None:
        present = find_device(jax.devices()[0].device_kind)
        return dataclasses.replace(present, target=None)
    if device.lower() not in device_names():
        raise ValueError(
            f"unknown device {device!r}; known are {', '.join(device_names())}. For "
            "another, pass mpjax.cost.Device(...)."
        )
    return _read(device.lower())


def find_device(device_kind: str) -> Device:
    """Returns the device that JAX names so, which may have no data file."""
    for name in device_names():
        if _read(name).device_kind == device_kind:
            return _read(name)
    return Device(name=device_kind, device_kind=device_kind)


@functools.cache
def _read(name: str) -> Device:
    data = tomllib.loads((_FOLDER / f"{name}.toml").read_text())
    peak, links = (
        {k: v for k, v in data[table].items() if k != "source"}
        for table in ("peak_flops_per_s", "links")
    )
    return Device(
        name=data["name"],
        memory_bytes=data["memory_bytes"],
        bandwidth_bytes_per_s=data["bandwidth_bytes_per_s"],
        peak_flops_per_s=peak,
        target=data["target"],
        device_kind=data["device_kind"],
        **links,
    )
