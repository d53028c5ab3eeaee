"""The one switch for everything in this package."""

import os

is_on = os.environ.get("MPJAX_XLA_CPU_FORMS", "1") != "0"
