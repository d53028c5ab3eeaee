"""Op-level automatic mixed precision for any JAX function."""

from mpjax._autocast.api import autocast, full_precision
from mpjax._autocast.half_precision import half_precision
from mpjax._autocast.report import AutocastRecord, AutocastReport, autocast_report
from mpjax._autocast.saved import SavedArray

__all__ = [
    "AutocastRecord",
    "AutocastReport",
    "SavedArray",
    "autocast",
    "autocast_report",
    "full_precision",
    "half_precision",
]
