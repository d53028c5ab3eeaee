"""See why half precision works or fails."""

from mpjax.numerics._causes import NonFinite
from mpjax.numerics._formats import (
    LossAtScale,
    LossScaleAdvice,
    RepresentableFraction,
    recommend_loss_scale,
    representable_fraction,
)
from mpjax.numerics._histogram import (
    ExponentHistogram,
    empty_histogram,
    exponent_histogram,
)
from mpjax.numerics._nonfinite import find_nonfinite
from mpjax.numerics._probe import OpHistograms, Probe, probe
from mpjax.numerics._tap import tap

__all__ = [
    "ExponentHistogram",
    "LossAtScale",
    "LossScaleAdvice",
    "NonFinite",
    "OpHistograms",
    "Probe",
    "RepresentableFraction",
    "empty_histogram",
    "exponent_histogram",
    "find_nonfinite",
    "probe",
    "recommend_loss_scale",
    "representable_fraction",
    "tap",
]
