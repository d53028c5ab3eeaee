"""Floating-point operations of one equation, counted from its shapes."""

import math
from typing import Any

from mpjax._jaxpr.primitives import Flops, facts_of


def count_flops(eqn: Any) -> int:
    """Returns the floating-point operations of an equation, without its inner jaxprs.

    A multiplication and an addition count two; an elementwise function counts one per
    element, a reduction one per element reduced. FFTs and linear algebra count one per
    element of their output, which is too few.
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
    rule = facts_of(eqn).flops
    if rule is Flops.NONE or not eqn.outvars:
        return 0
    return _size(eqn.invars[0] if rule is Flops.PER_INPUT else eqn.outvars[0])


def _dot_flops(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * _size(eqn.outvars[0]) * math.prod(lhs[axis] for axis in contracted)


def _size(atom: Any) -> int:
    return math.prod(getattr(atom.aval, "shape", ()))
