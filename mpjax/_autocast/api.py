"""`autocast` and `full_precision`: functions in, functions out."""

import contextlib
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mpjax._autocast.float8_devices import warn_if_emulated
from mpjax._autocast.kinds import choose_kinds
from mpjax._autocast.pipeline import run_pipeline
from mpjax._autocast.rewrite import Settings
from mpjax._autocast.tracing import make_jaxpr, tracing_in
from mpjax._jaxpr.core import eval_jaxpr, map_inner_jaxprs, open_jaxpr, with_equations
from mpjax._jaxpr.flatten import (
    FlatFunction,
    Static,
    flatten,
    refuse_modules,
    refuse_uncallable,
    unflatten,
)
from mpjax._jaxpr.provenance import RESERVED_AUTOCAST, RESERVED_FULL
from mpjax.policy import PolicyLike, PolicyRules, resolve


def autocast(
    fn: Callable[..., Any],
    policy: PolicyLike | PolicyRules = "mixed_bfloat16",
    *,
    low: Collection[str] = (),
    high: Collection[str] = (),
) -> Callable[..., Any]:
    """Makes any function run its matmuls and convolutions in half precision.

    The function is traced, and its operations rewritten, forward and backward:

    - matmuls and convolutions take and return half;
    - exponentials, powers, sums and other reductions run in float32, and so does
      a scalar product: a matmul with no free axis longer than 1;
    - linear algebra and its derivatives run as traced;
    - every other operation runs in the widest dtype of its operands, with three
      exceptions: a sum or product whose every consumer wants float32 runs in float32;
      a sum that goes on to a matmul (a biased activation, a residual stream, the result
      of a normalization) is half, as in a model by hand; and a value that reaches only
      matmuls (through maxima, reshapes, saved activation functions) is half;
    - a loop keeps its carry as traced, and saves in bfloat16 what its backward loop
      takes to a matmul (not in float16, whose range is smaller);
    - constants are never rounded: `x * 0.1` is computed in float32 and rounded once,
      and an operation with a constant that half cannot represent (a mask of -1e30, an
      epsilon of 1e-12) runs in float32.

    Only operations traced in float32 change: float64, complex, integers, keys and
    explicit half run exactly as before, and outputs keep their dtypes. A matmul that
    asks for `precision=` is left alone.

    Put it around the gradient, `autocast(jax.value_and_grad(loss_fn))`, which rewrites
    both passes at once; `jax.grad(autocast(fn))` works too. Gradients of float32
    parameters are float32.

    Tracing has the contract of `jax.jit`: no side effects, and numbers are traced like
    arrays; strings, functions and other leaves are static (close over a flag with
    `functools.partial`). Outside a jit it compiles once per shape, as `jax.jit` does.
    A kernel that has to be traced in half, such as cuDNN attention, goes through
    `half_precision`.
    The function must be pure: split and merge NNX modules, and pass the whole `apply`
    of a Linen or Haiku model, not a layer inside it that creates parameters.

    Args:
      fn: any function of pytrees.
      policy: matmuls and convolutions run in its compute dtype: float16, bfloat16, or
        float32 to rewrite nothing. `mixed_float8` runs matmuls in float8 where that
        pays, and all else as `mixed_bfloat16`. `PolicyRules` choose the policy by name
        scope (`encoder/Dense_0`), with a default elsewhere.
      low: names of further primitives to run in half, such as your own.
      high: names of primitives to run in float32, whatever mpjax's table says.

    Returns:
      A function with the arguments and outputs of `fn`.

    Raises:
      TypeError: if `fn` is no function; when called with an NNX module.
      ValueError: for an unknown policy, one that computes in float64, or a primitive in
        both `low` and `high`.

    >>> f = autocast(lambda x, w: jnp.tanh(x @ w).sum())
    >>> float(f(jnp.ones((2, 3)), jnp.ones((3, 4))))
    7.96...
    """
    refuse_uncallable(fn, "mpjax.autocast")
    settings = make_settings(policy, low, high)

    def evaluate(spec: Static, arrays: list[Any]):
        flat = FlatFunction(fn, spec)
        is_traced = any(isinstance(x, Tracer) for x in arrays)
        with jax.disable_jit(False):
            # One jit around it all: rewritten equations are not traced again.
            traced = jax.jit(flat) if is_traced else flat
            closed = make_jaxpr(traced, *arrays, rules=settings.rules)
        if settings.rules.has_float8():
            warn_if_emulated()
        if is_traced:
            rewritten = _run_inside(closed, settings)
        else:
            rewritten = run_pipeline(closed, settings)
        outputs = eval_jaxpr(open_jaxpr(rewritten), closed.consts, *arrays)
        return outputs, flat.out_spec

    return _jit(evaluate, fn, RESERVED_AUTOCAST)


def full_precision(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps a function as it is inside `autocast`: float32 stays float32.

    Use it for indices and sentinel values that pass through a matmul, as in
    `optax.ctc_loss`, and for code that must not lose a bit.

    Args:
      fn: any function of pytrees, under the contract of `jax.jit`.

    Returns:
      A function with the arguments and outputs of `fn`, compiled.

    Raises:
      TypeError: if `fn` is no function; when called with an NNX module.
    """
    refuse_uncallable(fn, "mpjax.full_precision")

    def evaluate(spec: Static, arrays: list[Any]):
        flat = FlatFunction(fn, spec)
        with tracing_in(()):
            return flat(*arrays), flat.out_spec

    return _jit(evaluate, fn, RESERVED_FULL)


def make_settings(
    policy: PolicyLike | PolicyRules, low: Collection[str], high: Collection[str]
) -> Settings:
    """Returns the settings that the arguments of `autocast` ask for.

    Raises:
      TypeError: for a list of primitives that is a string.
      ValueError: for a policy that computes in float64, or clashing lists.
    """
    rules = resolve(policy)
    for each in rules.policies():
        if jnp.dtype(each.compute_dtype).itemsize > 4:
            raise ValueError(
                f"the policy {each} computes in float64, and autocast only lowers "
                "float32; enable x64 and pass float64 arrays instead."
            )
    return Settings(rules, choose_kinds(low, high))


def _run_inside(jaxpr: Any, settings: Settings) -> Any:
    """Runs every pass on the jits of a jaxpr, which keeps its inputs and outputs."""
    eqns = [
        eqn.replace(
            params=map_inner_jaxprs(
                lambda inner: run_pipeline(inner, settings), eqn.params
            )
        )
        for eqn in open_jaxpr(jaxpr).eqns
    ]
    return with_equations(jaxpr, eqns=eqns)


def _jit(evaluate: Callable[..., Any], fn: Any, reserved: str) -> Callable[..., Any]:
    """Compiles under a reserved name that tells an outer autocast to leave it alone."""
    name = getattr(fn, "__name__", type(fn).__name__)
    evaluate.__name__ = evaluate.__qualname__ = f"{reserved}_{name}"
    jitted = jax.jit(evaluate)

    @functools.wraps(fn, updated=())
    def wrapper(*args, **kwargs):
        refuse_modules(fn, args, kwargs)
        arrays, spec = flatten((args, kwargs))
        # The jit carries the name, so it must not be disabled within a trace.
        traced = any(isinstance(x, Tracer) for x in arrays)
        with jax.disable_jit(False) if traced else contextlib.nullcontext():
            outputs, out_spec = jitted(spec, arrays)
        return unflatten(outputs, out_spec)

    return wrapper
