"""Op-level automatic mixed precision for any JAX function."""

from mpjax._autocast.api import autocast, full_precision
from mpjax._autocast.report import AutocastReport, OpRecord, autocast_report

__all__ = [
    "AutocastReport",
    "OpRecord",
    "autocast",
    "autocast_report",
    "full_precision",
]
