"""The form in which a convolution is written: what XLA:CPU makes of it depends on it.

It has a fast one for images of shape (B, H, W, C) and kernels of shape (H, W, C, D),
and brings others into that form, such as the gradient of a kernel; but none in a loop,
where such a gradient then takes many times as long. So they are written in it. On a GPU
XLA chooses how arrays lie in memory, and transposes around them move nothing
(tests/cost/test_train_step.py).
"""

from typing import Any

import jax

from mpjax._jaxpr import core as _jaxpr
from mpjax._jaxpr.passes import map_equations


def with_plain_convolutions(jaxpr: Any) -> Any:
    """Returns a jaxpr with all its convolutions, at any depth, so written.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the very object if nothing changed.
    """
    return map_equations(plain_convolution, jaxpr)


def plain_convolution(eqn: Any) -> list[Any]:
    """Returns equations for a convolution, transposes before and behind it.

    Args:
      eqn: any equation; left alone if it is no convolution, has that form already, or
        takes or gives arrays that are split over an explicit mesh.
    """
    if eqn.primitive.name != "conv_general_dilated":
        return [eqn]
    numbers, plain = eqn.params["dimension_numbers"], _plain_numbers(eqn)
    arrays = (*eqn.invars, *eqn.outvars)
    if numbers == plain or any(map(_jaxpr.is_split, arrays)):
        return [eqn]
    before, operands = [], []
    for x, spec, wanted in zip(eqn.invars, numbers[:2], plain[:2], strict=True):
        permutation = _permutation(spec, wanted)
        if permutation is not None:
            params = {"permutation": permutation}
            before.append(
                _jaxpr.new_eqn(jax.lax.transpose_p, [x], params, like=eqn, varies_as=x)
            )
        operands.append(x if permutation is None else before[-1].outvars[0])
    params = eqn.params | {"dimension_numbers": plain}
    permutation = _permutation(plain.out_spec, numbers.out_spec)
    if permutation is None:
        return [*before, eqn.replace(invars=operands, params=params)]
    conv = _jaxpr.new_eqn(
        eqn.primitive, operands, params, like=eqn, varies_as=eqn.outvars[0]
    )
    behind = eqn.replace(
        primitive=jax.lax.transpose_p,
        invars=conv.outvars,
        params={"permutation": permutation},
    )
    return [*before, conv, behind]


def _plain_numbers(conv: Any) -> Any:
    axes = range(conv.outvars[0].aval.ndim)
    last = axes[-1]
    image = (0, last, *axes[1:-1])
    kernel = (last, last - 1, *axes[:-2])
    return jax.lax.ConvDimensionNumbers(image, kernel, image)


def _permutation(spec: Any, wanted: Any) -> tuple[int, ...] | None:
    """Returns how to transpose an array of one form into another; None if it is so."""
    axes = dict(zip(wanted, spec, strict=True))
    permutation = tuple(axes[axis] for axis in range(len(axes)))
    return None if spec == wanted else permutation
