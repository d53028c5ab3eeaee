"""Where the arrays of a run are: on one device, or on the mesh of --mesh."""

import collections
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mpjax
from experiments.data.dataset import Dataset
from experiments.harness.config import BaseConfig
from experiments.harness.errors import ConfigError
from mpjax import sharding


class Devices:
    """Places states and batches; on one device it leaves them as they are.

    Attributes:
      mesh: the mesh; None for one device.
    """

    def __init__(self, mesh: Mesh | None = None):
        """Takes a mesh, or None for one device."""
        self.mesh = mesh
        if mesh is not None:
            everywhere = NamedSharding(sharding.auto_mesh(mesh), PartitionSpec())
            self._gather = jax.jit(lambda tree: tree, out_shardings=everywhere)

    def __str__(self) -> str:
        kind = jax.devices()[0].device_kind
        if self.mesh is None:
            return kind
        num = jax.process_count()
        return f"{self.axes()} of {kind}" + (f" in {num} processes" if num > 1 else "")

    def axes(self) -> str | None:
        """Returns the mesh as a flag names it; None for one device."""
        if self.mesh is None:
            return None
        return ",".join(f"{name}={size}" for name, size in self.mesh.shape.items())

    def own_part(self, dataset: Dataset) -> Dataset:
        """Returns what this process reads of every batch.

        Raises:
          ConfigError: if the batch cannot be divided.
        """
        if self.mesh is None or not self.mesh.is_multi_process:
            return dataset
        return dataset.shard(*sharding.process_share(self.mesh))

    def put_state(self, state: mpjax.TrainState) -> mpjax.TrainState:
        """Returns a state, equal in all processes, placed for the train step."""
        if self.mesh is None:
            return state
        return sharding.shard_state(state, self.mesh)

    def put_batch(self, batch: Any) -> Any:
        """Returns the batch of all processes, of which this one gives its part.

        Raises:
          ConfigError: if the devices cannot share it equally.
        """
        if self.mesh is None:
            return batch
        try:
            if not self.mesh.is_multi_process:
                return sharding.shard_batch(batch, self.mesh)
            return sharding.global_batch(batch, self.mesh)
        except ValueError as error:
            raise ConfigError(
                f"--mesh: {error} Choose --batch-size so that the devices share it."
            ) from error

    def whole(self, tree: Any) -> Any:
        """Returns arrays on one device of this process, each whole; all call it."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: x.addressable_data(0), self._gather(tree))

    def whole_state(
        self, state: mpjax.TrainState, *, has_optimizer: bool
    ) -> mpjax.TrainState:
        """Returns a state as evaluations and pictures want it; all call it.

        Args:
          state: on the mesh.
          has_optimizer: whether to gather the optimizer's state, too; it is None
            otherwise.
        """
        if self.mesh is None:
            return state
        return self.whole(state if has_optimizer else state.replace(opt_state=None))


def make_devices(config: BaseConfig) -> Devices:
    """Returns the devices that --mesh and --distributed ask for.

    Raises:
      ConfigError: if there are not so many, or processes were not started.
    """
    if config.distributed and not jax.distributed.is_initialized():
        raise ConfigError(
            "--distributed needs its processes started: run the module, or call "
            "jax.distributed.initialize() before anything is computed."
        )
    if config.mesh is None and not config.distributed:
        return Devices()
    try:
        mesh = sharding.make_mesh(config.mesh or "data=-1")
    except ValueError as error:
        raise ConfigError(f"--mesh: {error}") from error
    counts = collections.Counter(device.process_index for device in mesh.devices.flat)
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{num} of process {i}" for i, num in sorted(counts.items()))
        raise ConfigError(
            f"--mesh: every process must have as many devices in the mesh, got {each} "
            f"in {dict(mesh.shape)}; use all devices (-1), or the same number of each."
        )
    return Devices(mesh)
