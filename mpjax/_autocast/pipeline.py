"""What `autocast` does to a jaxpr: every pass, in its order.

Each pass takes a jaxpr and returns one with the same inputs and outputs, or the same
object if it has nothing to do.
"""

from collections.abc import Callable
from typing import Any

from mpjax._autocast.hoist import hoist_casts_out_of_scans
from mpjax._autocast.inline import inline_calls_with_scans
from mpjax._autocast.quantize import quantize_matmuls
from mpjax._autocast.residuals import minimize_residuals
from mpjax._autocast.rewrite import Rewriter, Settings
from mpjax._autocast.sink import sink_broadcasts_into_scans
from mpjax._xla_cpu.convolutions import put_half_channels_last
from mpjax._xla_cpu.matmuls import add_unit_axes, swap_transposed_matmuls
from mpjax._xla_cpu.sums import round_half_sums_once


def rewrite_in_half(jaxpr: Any, settings: Settings, scope: str = "") -> Any:
    """Rewrites the operations by the demands on their values."""
    return Rewriter(settings, run_pipeline).rewrite(jaxpr, scope)


PASSES: tuple[Callable[..., Any], ...] = (
    rewrite_in_half,
    # A jitted loss hides the forward loop from the backward loop.
    inline_calls_with_scans,
    # A forward loop saves no more than it must for the backward loop.
    minimize_residuals,
    # Masks are broadcast inside a loop, not held at full size beside it.
    sink_broadcasts_into_scans,
    # Weights are cast once, before a loop, not at each of its steps.
    hoist_casts_out_of_scans,
    # Gradients of weights come out as they are stored, for XLA:CPU.
    swap_transposed_matmuls,
    # Operands are scaled and rounded once, and weights before a loop.
    quantize_matmuls,
    # The forms that XLA:CPU runs fast, and with float32 sums.
    round_half_sums_once,
    add_unit_axes,
    put_half_channels_last,
)


def run_pipeline(jaxpr: Any, settings: Settings, scope: str = "") -> Any:
    """Runs every pass.

    Args:
      jaxpr: closed or open.
      settings: the rules, and the kinds of primitives.
      scope: the name scope of the jaxpr.

    Returns:
      The jaxpr; the same object if nothing can run in half.
    """
    rewritten = rewrite_in_half(jaxpr, settings, scope)
    if rewritten is jaxpr:
        return jaxpr
    for run in PASSES[1:]:
        rewritten = run(rewritten)
    return rewritten
