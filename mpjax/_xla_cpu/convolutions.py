"""Writes convolutions in the form that XLA:CPU runs fast.

XLA:CPU is fast for images of shape (B, H, W, C) and kernels of shape (H, W, C, D). It
brings other convolutions into this form, such as the gradient of a kernel, but not in
a loop, where such a gradient then takes many times as long. So convolutions are written
in this form. On a GPU XLA chooses the layout of arrays in memory, and the transposes
around a convolution move nothing (tests/cost/test_train_step.py).
"""

from typing import Any

import jax

from mpjax._jaxpr.core import MadeHalf, is_split, new_eqn
from mpjax._jaxpr.passes import map_equations
from mpjax._xla_cpu import switch
from mpjax._xla_cpu.hints import stored


def put_half_channels_last(jaxpr: Any) -> Any:
    """Writes the convolutions that autocast made half channels last.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """

    def convert(eqn):
        return channels_last(eqn) if isinstance(eqn.params, MadeHalf) else [eqn]

    return map_equations(convert, jaxpr) if switch.is_on else jaxpr


def put_channels_last(jaxpr: Any) -> Any:
    """Writes all convolutions channels last, whatever their dtype: for loops.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """
    return map_equations(channels_last, jaxpr) if switch.is_on else jaxpr


def channels_last(eqn: Any) -> list[Any]:
    """Returns equations for a convolution, transposes before and after it.

    Args:
      eqn: any equation; left alone if it is not a convolution, has that form already,
        or takes or returns arrays that are split over an explicit mesh.
    """
    if eqn.primitive.name != "conv_general_dilated":
        return [eqn]
    numbers, wanted_numbers = eqn.params["dimension_numbers"], _channels_last(eqn)
    arrays = (*eqn.invars, *eqn.outvars)
    if numbers == wanted_numbers or any(map(is_split, arrays)):
        return [eqn]
    before, operands = [], []
    specs = zip(eqn.invars, numbers[:2], wanted_numbers[:2], strict=True)
    for x, spec, wanted in specs:
        permutation = _permutation(spec, wanted)
        if permutation is not None:
            params = {"permutation": permutation}
            # Fused into the transposition, what computes the operand would read its own
            # operands in steps as wide as a row.
            before.append(stored(x, like=eqn))
            (x,) = before[-1].outvars
            before.append(
                new_eqn(jax.lax.transpose_p, [x], params, like=eqn, varies_as=x)
            )
        operands.append(x if permutation is None else before[-1].outvars[0])
    params = eqn.params | {"dimension_numbers": wanted_numbers}
    permutation = _permutation(wanted_numbers.out_spec, numbers.out_spec)
    if permutation is None:
        return [*before, eqn.replace(invars=operands, params=params)]
    conv = new_eqn(eqn.primitive, operands, params, like=eqn, varies_as=eqn.outvars[0])
    after = eqn.replace(
        primitive=jax.lax.transpose_p,
        invars=conv.outvars,
        params={"permutation": permutation},
    )
    return [*before, conv, after]


def _channels_last(conv: Any) -> Any:
    axes = range(conv.outvars[0].aval.ndim)
    last = axes[-1]
    image = (0, last, *axes[1:-1])
    kernel = (last, last - 1, *axes[:-2])
    return jax.lax.ConvDimensionNumbers(image, kernel, image)


def _permutation(spec: Any, wanted: Any) -> tuple[int, ...] | None:
    """Returns the permutation from one layout to another; None if they are equal."""
    axes = dict(zip(wanted, spec, strict=True))
    permutation = tuple(axes[axis] for axis in range(len(axes)))
    return None if spec == wanted else permutation
