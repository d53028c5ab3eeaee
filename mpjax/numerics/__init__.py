"""Shows why half precision works or fails: histograms, probes, Inf and NaN, reports."""

from mpjax.numerics._causes import NonFinite
from mpjax.numerics._findings import Finding
from mpjax.numerics._formats import (
    LossAtScale,
    LossScaleAdvice,
    RepresentableFraction,
    float8_fraction,
    recommend_loss_scale,
    representable_fraction,
)
from mpjax.numerics._histogram import (
    ExponentHistogram,
    empty_histogram,
    exponent_histogram,
)
from mpjax.numerics._histogram_loss_scale import HistogramLossScale
from mpjax.numerics._nonfinite import find_nonfinite
from mpjax.numerics._probe import OpHistograms, Probe, probe
from mpjax.numerics._report import (
    PrecisionRecord,
    PrecisionReport,
    precision_report,
)
from mpjax.numerics._tap import tap

__all__ = [
    "ExponentHistogram",
    "Finding",
    "HistogramLossScale",
    "LossAtScale",
    "LossScaleAdvice",
    "NonFinite",
    "OpHistograms",
    "PrecisionRecord",
    "PrecisionReport",
    "Probe",
    "RepresentableFraction",
    "empty_histogram",
    "exponent_histogram",
    "find_nonfinite",
    "float8_fraction",
    "precision_report",
    "probe",
    "recommend_loss_scale",
    "representable_fraction",
    "tap",
]
