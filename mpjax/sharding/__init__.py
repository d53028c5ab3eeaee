"""Shardings of a train step's arrays on a mesh of devices.

Two axis names have a meaning: a batch is split over `data` and `fsdp`, parameters and
optimizer state over `fsdp` (ZeRO-3, arXiv:1910.02054) and replicated over all others.
`LayoutRules` lay parameters out otherwise, by their paths. The mesh may span several
processes.
"""

from mpjax.sharding._batch import (
    BATCH_AXES,
    batch_sharding,
    check_batch,
    global_batch,
    process_share,
    shard_batch,
)
from mpjax.sharding._layout import (
    PARAM_AXIS,
    LayoutRules,
    check_placement,
    state_sharding,
)
from mpjax.sharding._mesh import auto_mesh, make_mesh
from mpjax.sharding._state import shard_state

__all__ = [
    "BATCH_AXES",
    "PARAM_AXIS",
    "LayoutRules",
    "auto_mesh",
    "batch_sharding",
    "check_batch",
    "check_placement",
    "global_batch",
    "make_mesh",
    "process_share",
    "shard_batch",
    "shard_state",
    "state_sharding",
]
