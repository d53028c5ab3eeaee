"""What the tests of float8 share."""

import jax
import numpy as np

from mpjax._jaxpr.core import walk

# Bits of fraction, exponent of the smallest normal number, largest number.
FORMATS = {"float8_e4m3fn": (3, -6, 448.0), "float8_e5m2": (2, -14, 57344.0)}


def operand_formats(fn, *args):
    """Returns the operand dtypes of every matmul, and how often it runs."""
    found = []
    for eqn, _, times in walk(jax.make_jaxpr(fn)(*args)):
        if eqn.primitive.name == "dot_general":
            names = [str(x.aval.dtype).removeprefix("float8_") for x in eqn.invars]
            found.append((*names, times))
    return found


def quantized(fn, *args):
    """Returns the shape and dtype of every array that is quantized, and how often."""
    return [
        (eqn.outvars[0].aval.shape, str(eqn.outvars[0].aval.dtype), times)
        for eqn, _, times in walk(jax.make_jaxpr(fn)(*args))
        if eqn.params.get("name") == "quantize_float8"
    ]


def rounding_error(x, dtype):
    """Returns how far quantizing moves each number of an array at most, in float64."""
    fraction, smallest, largest = FORMATS[dtype]
    _, exponent = np.frexp(np.max(np.abs(x), initial=0) / largest)
    # At most twice as coarse as the largest number would allow.
    spacing = np.ldexp(1.0, int(exponent) + smallest - fraction)
    # Rounded to bfloat16 first.
    return np.maximum(np.abs(x) * (2.0 ** -(fraction + 1) + 2.0**-8), spacing / 2)
