"""What a step costs: memory, FLOPs, traffic and roofline time.

Also on GPUs you don't have. Compiling for a GPU needs JAX's CUDA plugin, but no GPU.
"""

from mpjax.cost._analyze import CostReport, analyze
from mpjax.cost._compare import PolicyCosts, compare
from mpjax.cost._compile import CompileError, MissingPluginError
from mpjax.cost._devices import Device, device_names, get_device

__all__ = [
    "CompileError",
    "CostReport",
    "Device",
    "MissingPluginError",
    "PolicyCosts",
    "analyze",
    "compare",
    "device_names",
    "get_device",
]
