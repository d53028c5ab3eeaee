"""How autocast traces a function: `half_precision` inside it learns the compute dtypes.

The dtypes are part of the keys of JAX's caches (`jax.make_user_context`): a function
jitted by the user is traced anew under autocast, and neither trace replaces the other.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mpjax.policy import PolicyRules

# Names of the dtypes that `half_precision` may trace its function in, that of the
# default policy first; empty outside autocast, and where nothing is to be half.
_compute_dtypes = jax.make_user_context(())

_HALF = r"\b(?:bf16|bfloat16|fp16|f16|float16|half)\b"
_WANTS_HALF = re.compile(
    rf"\b(?:must|should|only|expect|requir|support|need|want)[^\n]*{_HALF}[^\n]*"
    r"\b(?:got|but|found|received|given|is|was|not)\b[^\n]*\b(?:float32|fp32|f32)\b",
    re.IGNORECASE,
)
_NOTE = (
    "autocast traces a function in float32 before it rewrites it. Wrap a kernel that "
    "must be traced in half, such as cuDNN attention or a Pallas kernel: "
    "mpjax.half_precision(fn)."
)


def make_jaxpr(fn: Callable[..., Any], *args: Any, rules: PolicyRules) -> Any:
    """Returns the closed jaxpr of a function that autocast is to rewrite.

    An error that asks for half gets a note that names `half_precision`.

    Args:
      fn: function of arrays.
      *args: arrays, or their shapes and dtypes.
      rules: the policies of the autocast.
    """
    dtypes = dtypes_of(rules)
    try:
        with tracing_in(dtypes):
            return jax.make_jaxpr(fn)(*args)
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        if dtypes and _WANTS_HALF.search(str(error)) and _NOTE not in notes:
            error.add_note(_NOTE)
        raise


def compute_dtypes() -> tuple[str, ...]:
    """Returns the dtypes that the surrounding autocast may compute in."""
    return _compute_dtypes.value


@contextlib.contextmanager
def tracing_in(dtypes: tuple[str, ...]) -> Iterator[None]:
    """Says, while its block traces, which dtypes `half_precision` may take."""
    with _compute_dtypes(dtypes):
        yield


def dtypes_of(rules: PolicyRules) -> tuple[str, ...]:
    """Returns the compute dtypes of rules, the default's first; empty if none is half.

    Args:
      rules: policies by name scope.
    """
    *others, default = (jnp.dtype(p.compute_dtype) for p in rules.policies())
    dtypes = dict.fromkeys([default, *others])
    is_full = all(dtype.itemsize >= 4 for dtype in dtypes)
    return () if is_full else tuple(dtype.name for dtype in dtypes)
