"""Floating-point operations of one equation, counted from its shapes."""

import math
from typing import Any

# Moves numbers, or compares them: no arithmetic.
_FREE_OF_CHARGE = frozenset(
    (
        "all_gather",
        "all_to_all",
        "bitcast_convert_type",
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "device_put",
        "dynamic_slice",
        "dynamic_update_slice",
        "gather",
        "iota",
        "name",
        "optimization_barrier",
        "pad",
        "ppermute",
        "pvary",
        "random_bits",
        "random_seed",
        "random_split",
        "random_wrap",
        "random_unwrap",
        "reshape",
        "reshard",
        "rev",
        "select_n",
        "sharding_constraint",
        "slice",
        "split",
        "squeeze",
        "stack",
        "stop_gradient",
        "tile",
        "transpose",
        "unstack",
    )
)


def count_flops(eqn: Any) -> int:
    """Returns the floating-point operations of an equation without what is inside it.

    A multiplication and an addition are two; an elementwise function counts one per
    element, a reduction one per element reduced. FFTs and linear algebra count one per
    element of their output: too few.
    """
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot_flops(eqn)
    if name == "ragged_dot_general":
        return 2 * _size(eqn.outvars[0]) * eqn.invars[0].aval.shape[-1]
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * _size(eqn.outvars[0]) * (math.prod(kernel) // max(out_features, 1))
    if name in _FREE_OF_CHARGE or not eqn.outvars:
        return 0
    is_reduction = name.startswith(("reduce_", "cum", "arg"))
    return _size(eqn.invars[0] if is_reduction else eqn.outvars[0])


def _dot_flops(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * _size(eqn.outvars[0]) * math.prod(lhs[axis] for axis in contracted)


def _size(atom: Any) -> int:
    return math.prod(getattr(atom.aval, "shape", ()))
