"""Mixed-precision training for JAX: policies, loss scaling, train steps.

The packages `mpjax.numerics`, `mpjax.cost` and `mpjax.sharding` are attributes too,
imported when they are first used.
"""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from mpjax._autocast import (
    AutocastRecord,
    AutocastReport,
    SavedArray,
    autocast,
    autocast_report,
    full_precision,
    half_precision,
)
from mpjax.half_weights import (
    MasterWeightsState,
    StochasticRoundingState,
    stochastic_round,
    with_master_weights,
    with_stochastic_rounding,
)
from mpjax.loss_scale import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    StaticLossScale,
    parse_loss_scale,
)
from mpjax.nonfinite import NonFiniteGuard, NonFiniteTrainingError
from mpjax.optimizer import (
    LossScaleState,
    loss_scale_state,
    scale_loss,
    with_loss_scale,
)
from mpjax.policy import PRESETS, PolicyRules, get_policy
from mpjax.train import TrainState, make_eval_step, make_train_step

if TYPE_CHECKING:
    from mpjax import cost, numerics, sharding

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AutocastRecord",
    "AutocastReport",
    "DynamicLossScale",
    "LossScale",
    "LossScaleState",
    "MasterWeightsState",
    "NoOpLossScale",
    "NonFiniteGuard",
    "NonFiniteTrainingError",
    "PolicyRules",
    "SavedArray",
    "StaticLossScale",
    "StochasticRoundingState",
    "TrainState",
    "autocast",
    "autocast_report",
    "cost",
    "full_precision",
    "get_policy",
    "half_precision",
    "loss_scale_state",
    "make_eval_step",
    "make_train_step",
    "numerics",
    "parse_loss_scale",
    "scale_loss",
    "sharding",
    "stochastic_round",
    "with_loss_scale",
    "with_master_weights",
    "with_stochastic_rounding",
]

_PACKAGES = ("cost", "numerics", "sharding")


def __getattr__(name: str) -> Any:
    """Imports a package when it is first used as an attribute of `mpjax`."""
    if name in _PACKAGES:
        return importlib.import_module(f"mpjax.{name}")
    close = difflib.get_close_matches(name, __all__, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise AttributeError(f"module 'mpjax' has no attribute {name!r}.{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES})
