"""What a step costs: memory, FLOPs, traffic, time at best; also on absent GPUs."""

from mpjax.cost._analyze import CostReport, analyze
from mpjax.cost._compare import PolicyCosts, compare
from mpjax.cost._compile import CompileError
from mpjax.cost._devices import Device, device_names, get_device

__all__ = [
    "CompileError",
    "CostReport",
    "Device",
    "PolicyCosts",
    "analyze",
    "compare",
    "device_names",
    "get_device",
]
