"""Mixed-precision training for JAX: policies, loss scaling, train steps."""

from mpjax._autocast import (
    AutocastReport,
    OpRecord,
    autocast,
    autocast_report,
    full_precision,
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

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AutocastReport",
    "DynamicLossScale",
    "LossScale",
    "LossScaleState",
    "MasterWeightsState",
    "NoOpLossScale",
    "NonFiniteGuard",
    "NonFiniteTrainingError",
    "OpRecord",
    "PolicyRules",
    "StaticLossScale",
    "StochasticRoundingState",
    "TrainState",
    "autocast",
    "autocast_report",
    "full_precision",
    "get_policy",
    "loss_scale_state",
    "make_eval_step",
    "make_train_step",
    "parse_loss_scale",
    "scale_loss",
    "stochastic_round",
    "with_loss_scale",
    "with_master_weights",
    "with_stochastic_rounding",
]
