"""Gradients of convolution kernels, added up over devices in float32.

cuDNN returns the dtype of the images that it takes. For a float32 result XLA casts both
images to float32: twice the memory, at half the speed. So each device computes its part
in half, as PyTorch's DDP does, and the parts are added up in float32.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from mpjax._jaxpr.core import Var, context_of, convert_eqn
from mpjax.sharding import BATCH_AXES, auto_mesh

_FLOAT32 = np.dtype(np.float32)


def add_parts_in_float32(conv: Any, out: Var, mesh: Any) -> list[Any]:
    """Returns equations for the gradient of a kernel, in float32.

    Args:
      conv: a convolution of half images, which contracts the axis of the batch.
      out: float32 variable for the result.
      mesh: the devices that share the batch; None if each has a batch of its own, as
        inside `shard_map`. There the part of one device is cast.
    """
    if mesh is None or getattr(conv.ctx.cur_abstract_mesh, "manual_axes", ()):
        return [conv, convert_eqn(conv.outvars[0], out, conv)]
    axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    num_parts = math.prod(mesh.shape[name] for name in axes)
    numbers = conv.params["dimension_numbers"]
    contracted = numbers.lhs_spec[1], numbers.rhs_spec[1]
    sizes = [x.aval.shape[i] for x, i in zip(conv.invars, contracted, strict=True)]
    if any(size % num_parts for size in sizes) or sizes[0] != sizes[1]:
        return [
            conv.replace(
                outvars=[out],
                params=conv.params | {"preferred_element_type": _FLOAT32},
            )
        ]

    def part(x, y):
        out = conv.primitive.bind(x, y, **conv.params).astype(_FLOAT32)
        return out[(None,) * len(axes)]

    def summed(x, y):
        in_specs = (PartitionSpec(*[None] * axis, axes) for axis in contracted)
        parts = jax.shard_map(
            part,
            mesh=auto_mesh(mesh),
            in_specs=tuple(in_specs),
            out_specs=PartitionSpec(*axes),
            axis_names=set(axes),
            check_vma=False,
        )(x, y)
        # Over `fsdp` first: each device then adds up its own piece over `data`.
        for _ in axes[1:]:
            parts = jax.lax.optimization_barrier(parts.sum(1))
        return parts.sum(0)

    with jax.disable_jit(False), context_of(conv):
        (call,) = jax.make_jaxpr(jax.jit(summed))(*(x.aval for x in conv.invars)).eqns
    return [call.replace(invars=conv.invars, outvars=[out])]
