"""`half_precision`: a function that autocast traces in half, not in float32.

Its casts and operations are in a jit with a reserved name, which autocast leaves alone
and JAX differentiates.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._autocast.choices import half_name, trace_in_each
from mpjax._autocast.tracing import compute_dtypes
from mpjax._jaxpr.flatten import (
    FlatFunction,
    Static,
    flatten,
    refuse_modules,
    refuse_uncallable,
    unflatten,
)


def half_precision(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a function with half arguments inside `autocast`, elsewhere as it is.

    It is the counterpart of `full_precision`, for kernels that look at dtypes while
    they are traced: cuDNN attention, Pallas kernels, layers of Transformer Engine.
    `autocast` traces a function in float32 before it rewrites it, which such a kernel
    refuses, or takes for a request to compute in float32.

    Under `autocast`, at any depth (`jit`, `scan`, `jax.checkpoint`, custom derivatives,
    `grad` inside or around), float32 arrays among the arguments are cast to the compute
    dtype of the policy (under `PolicyRules` that of the name scope) before `fn` is
    traced, and outputs in this dtype are cast back to float32. Everything else passes:
    float64, integers, keys, arrays that are half already, Python numbers. Without
    a float32 argument the outputs stay as they are, too. Whatever `fn` does inside runs
    as traced. Gradients with respect to float32 arguments are float32.

    Where the policy computes in float32, inside `full_precision` and outside `autocast`
    `fn` runs as it is. A kernel that refuses float32 then raises its own error:
    initialize a model that contains it under autocast too,
    `mpjax.autocast(model.init)(key, x)`.

    Args:
      fn: any function of pytrees, under the contract of `jax.jit`: a Linen layer
        inside another is none. Arrays that it closes over are not cast.

    Returns:
      A function with the arguments and outputs of `fn`.

    Raises:
      TypeError: if `fn` is no function; when called with an NNX module under autocast.
      ValueError: when a rule asks, for the name scope of a call, for a dtype in which
        `fn` cannot be traced.

    >>> from mpjax import autocast
    >>> kernel = half_precision(lambda x: (2 * x, x.dtype.name))
    >>> kernel(jnp.ones(2))
    (Array([2., 2.], dtype=float32), 'float32')
    >>> autocast(kernel)(jnp.ones(2))
    (Array([2., 2.], dtype=float32), 'bfloat16')

    Attention over arrays of shape (batch, length, heads, width) by cuDNN:

    >>> attention = half_precision(
    ...     functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    ... )
    """
    refuse_uncallable(fn, "mpjax.half_precision")
    own_name = getattr(fn, "__name__", type(fn).__name__)

    @functools.cache
    def traced_in(dtype: str, candidates: tuple[str, ...]) -> Callable[..., Any]:
        def evaluate(spec: Static, arrays: list[Any]):
            flat = FlatFunction(fn, spec)
            outputs = _call_in(dtype, flat, arrays)
            return outputs, flat.out_spec

        name = half_name(candidates, own_name)
        evaluate.__name__ = evaluate.__qualname__ = name
        return jax.jit(evaluate)

    @functools.wraps(fn, updated=())
    def wrapper(*args, **kwargs):
        candidates = compute_dtypes()
        if not candidates:
            return fn(*args, **kwargs)
        refuse_modules(fn, args, kwargs)
        arrays, spec = flatten((args, kwargs), are_numbers_static=True)
        # The jit carries the name, so it must not be disabled.
        with jax.disable_jit(False):
            if any(map(_is_float32, arrays)):
                outputs, out_spec = trace_in_each(traced_in, candidates, spec, arrays)
            else:
                outputs, out_spec = traced_in("", ())(spec, arrays)
        return unflatten(outputs, out_spec)

    return wrapper


def _call_in(dtype: str, fn: Callable[..., Any], arrays: list[Any]) -> list[Any]:
    """Calls a function with its float32 arguments in a dtype; outputs as documented."""
    is_cast = any(map(_is_float32, arrays))
    outputs = fn(*(jnp.asarray(x, dtype) if _is_float32(x) else x for x in arrays))
    if not is_cast:
        return outputs
    is_in_dtype = lambda x: getattr(x, "dtype", None) == dtype
    return [jnp.asarray(x, jnp.float32) if is_in_dtype(x) else x for x in outputs]


def _is_float32(x: Any) -> bool:
    return getattr(x, "dtype", None) == jnp.float32
