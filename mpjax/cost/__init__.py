"""What a step costs: memory, FLOPs, traffic, communication and modelled time.

Also on GPUs you don't have, one or hundreds. Compiling for a GPU needs JAX's CUDA
plugin, but no GPU.
"""

from mpjax.cost._analyze import CostReport, analyze
from mpjax.cost._collectives import Collective
from mpjax.cost._compare import PolicyCosts, compare
from mpjax.cost._compile import CompileError, MissingPluginError, device_mesh
from mpjax.cost._devices import Device, device_names, get_device

__all__ = [
    "Collective",
    "CompileError",
    "CostReport",
    "Device",
    "MissingPluginError",
    "PolicyCosts",
    "analyze",
    "compare",
    "device_mesh",
    "device_names",
    "get_device",
]
