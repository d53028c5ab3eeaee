"""Op-level automatic mixed precision for any JAX function."""

from mpjax.autocast._api import autocast, full_precision

__all__ = ["autocast", "full_precision"]
