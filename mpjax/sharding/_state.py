"""A train state placed on the devices of a mesh, in one process or several."""

import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mpjax._tree import is_key, path_name
from mpjax.sharding._layout import LayoutRules, state_sharding
from mpjax.sharding._place import host_value, is_local, place


def shard_state(state: Any, mesh: Mesh, *, layout: LayoutRules | None = None) -> Any:
    """Places a train state on the mesh as `make_train_step(mesh=mesh)` keeps it.

    Where the mesh spans processes, each of them makes the same whole state, by the same
    key or from the same checkpoint, and keeps its part; that they are equal is checked
    by a checksum of every array. All processes call it.

    Args:
      state: the state, or any tree that `state_sharding` takes.
      mesh: the devices.
      layout: the rules that the step has too; None for the built-in layout.

    Raises:
      ValueError: if a rule does not fit its parameter, or processes hold different
        values.
    """
    shardings = state_sharding(state, mesh, layout=layout)
    if mesh.is_multi_process:
        _check_equal(state)
    return jax.tree.map(place, state, shardings)


def _check_equal(state: Any) -> None:
    """Raises ValueError in all processes if one holds another value than the first."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    local = [(path_name(path), x) for path, x in leaves if is_local(x)]
    own = np.array([_checksum(x) for _, x in local], np.uint32)
    sums = multihost_utils.process_allgather(own)
    different = np.argwhere(sums != sums[:1])
    if len(different):
        process, leaf = different[0]
        raise ValueError(
            f"every process must hold the same state, but {local[leaf][0]} differs "
            f"between process 0 and process {process}: create it with the same key and "
            "parameters everywhere, or restore the same checkpoint."
        )


def _checksum(x: Any) -> int:
    value = host_value(jax.random.key_data(x) if is_key(x) else x)
    return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
