"""Where an equation comes from: its name scope, its pass, and what traced it."""

import re
from typing import Any

RESERVED_AUTOCAST = "mpjax_autocast"
RESERVED_FULL = "mpjax_full_precision"
RESERVED_HALF = "mpjax_half_precision"
FLOAT8_MATMUL = "mpjax_float8_matmul"


def is_reserved(eqn: Any, *names: str) -> bool:
    """Whether an equation is a nested `autocast`, `full_precision` or `half_precision`.

    Args:
      eqn: the equation.
      *names: the reserved names that count; all of them if there are none.
    """
    name = eqn.params.get("name")
    names = names or (RESERVED_AUTOCAST, RESERVED_FULL, RESERVED_HALF)
    return isinstance(name, str) and name.startswith(names)


def is_float8_matmul(eqn: Any) -> bool:
    """Whether an equation is a matmul that autocast made float8.

    It is a call. Its first two operands are those of the matmul before they were scaled
    and rounded.
    """
    return eqn.params.get("name") == FLOAT8_MATMUL


_TRANSFORM = re.compile(r"\b(?:jvp|transpose|vmap|checkpoint|rematted_computation)\(")


def join_scope(scope: str, eqn: Any) -> str:
    """Returns the name scope of an equation inside `scope`, without transforms.

    JAX names the backward pass of `encoder` `transpose(jvp(encoder))`; here both are
    `encoder`.
    """
    own = str(eqn.source_info.name_stack)
    if not own:
        return scope
    parts = []
    for part in own.split("/"):
        bare = _TRANSFORM.sub("", part)
        bare = bare.rstrip(")") if bare != part else bare
        if bare in ("", "rematted_computation"):
            continue
        if not parts or parts[-1] != bare:
            parts.append(bare)
    return "/".join([scope, *parts]) if scope else "/".join(parts)


def is_backward(eqn: Any, inherited: bool = False) -> bool:
    """Whether an equation belongs to a backward pass, by JAX's name for it.

    What a checkpoint computes again there belongs to the forward pass.

    Args:
      eqn: the equation.
      inherited: whether the equation around it belongs to a backward pass.
    """
    stack = str(eqn.source_info.name_stack)
    if "rematted_computation" in stack:
        return False
    return inherited or "transpose(" in stack


_LINEAR_ALGEBRA = re.compile(
    r"jax/(_src/lax/linalg|_src/lax/control_flow/solves|_src/numpy/linalg"
    r"|_src/scipy/linalg|_src/tpu/linalg/\w+|_src/scipy/sparse/linalg)\.py$"
)
# Matmuls by their own name, whatever calls them; and a solver that calls functions of
# the user's.
_MATMULS = ("matmul", "vecdot", "multi_dot", "matrix_power", "tensordot", "outer")
_ROOTS = ("custom_root", "_custom_root", "root", "root_jvp")


def is_linear_algebra(eqn: Any) -> bool:
    """Whether JAX's linear algebra traced it: a decomposition, a solver, a derivative.

    JAX differentiates these by rules with matmuls of their own, which say by the calls
    that led to them where they come from. A matmul of `jnp.linalg`'s own name, such as
    `jnp.linalg.multi_dot`, is none.
    """
    traceback = eqn.source_info.traceback
    if traceback is None:
        return False
    calls = [
        frame.function_name
        for frame in traceback.frames
        if _LINEAR_ALGEBRA.search(frame.file_name) and frame.function_name not in _ROOTS
    ]
    # The last is the call that is nearest to the user.
    return bool(calls) and calls[-1] not in _MATMULS
