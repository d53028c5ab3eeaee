"""A training step under several policies, on several meshes: costs, largest batch."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mpjax._report import plain_table, print_report, rich_group, rich_table
from mpjax._tree import is_half
from mpjax.cost._analyze import CostReport, analyze
from mpjax.cost._compile import compile_for, peak_bytes
from mpjax.cost._devices import Device
from mpjax.cost._mesh import choose_device, choose_mesh, describe_mesh, place_args

_COLUMNS = (
    "policy",
    "batch",
    "arguments, MB",
    "temporaries, MB",
    "peak, MB",
    "to first",
    "matmuls in half",
    "moved, MB",
    "roofline, ms",
    "bound by",
    "largest batch",
)
_MESH_COLUMNS = ("sent, MB", "best, ms", "worst, ms")


@dataclasses.dataclass(frozen=True)
class PolicyCosts:
    """Costs by policy; `print(costs)`, `costs.print()`, `costs.to_dict()`.

    On meshes the names are those of policy and mesh, `float32, data=64 x fsdp=8`; each
    report is that of one device, and a batch is that of the whole mesh.

    Attributes:
      device: name of the device.
      reports: a `CostReport` per policy.
      batch_sizes: batch size of each report.
      largest_batch: number of examples that fit, per policy; None if the device's
        memory is unknown.
      memory_fraction: the share of the device's memory that counts as usable.
    """

    device: str
    reports: dict[str, CostReport]
    batch_sizes: dict[str, int]
    largest_batch: dict[str, int | None]
    memory_fraction: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the costs as plain values, ready for JSON."""
        return {
            "device": self.device,
            "memory_fraction": self.memory_fraction,
            "policies": {
                name: report.to_dict()
                | {
                    "batch_size": self.batch_sizes[name],
                    "largest_batch": self.largest_batch[name],
                }
                for name, report in self.reports.items()
            },
        }

    def print(self) -> None:
        """Prints the table, through rich on a terminal if rich is installed."""
        print_report(self)

    def __rich__(self) -> Any:
        return rich_group(self._title(), rich_table(self._columns(), self._rows()))

    def __str__(self) -> str:
        return f"{self._title()}\n{plain_table(self._columns(), self._rows())}"

    def _title(self) -> str:
        return f"{self.device}, {100 * self.memory_fraction:g} % of its memory usable"

    def _columns(self) -> tuple[str, ...]:
        return _COLUMNS + (_MESH_COLUMNS if self._has_meshes() else ())

    def _has_meshes(self) -> bool:
        return any(report.mesh for report in self.reports.values())

    def _rows(self) -> list[tuple[str, ...]]:
        first = next(iter(self.reports.values())).peak_bytes
        rows = []
        for name, r in self.reports.items():
            row = (
                name,
                str(self.batch_sizes[name]),
                _mb(r.argument_bytes),
                _mb(r.temporary_bytes),
                _mb(r.peak_bytes),
                f"{r.peak_bytes / first:.2f}",
                f"{100 * half_share(r):.0f} %",
                _mb(r.moved_bytes),
                _ms(r.roofline_s),
                r.bound or "-",
                f"{self.largest_batch[name] or '-'}",
            )
            on_mesh = (_mb(r.sent_bytes), _ms(r.best_s), _ms(r.worst_s))
            rows.append(row + (on_mesh if self._has_meshes() else ()))
        return rows


def compare(
    make: Callable[..., tuple[Any, ...]],
    policies: Sequence[str],
    *,
    meshes: Sequence[Mesh] | None = None,
    device: str | Device | None = None,
    memory_fraction: float = 0.75,
) -> PolicyCosts:
    """Tells what a training step costs under each of several policies.

    It takes a function that makes the step and its arguments, because a policy may
    change both, and returns the costs. Nothing is run; see `analyze`. The largest batch
    is found by compiling at growing batch sizes, since memory is close to affine in the
    batch size.

    Args:
      make: `make(policy) -> (step, *args)`, with meshes `make(policy, mesh)`; the last
        argument is the batch, whose leaves have the examples along axis 0. Arguments
        may be `jax.ShapeDtypeStruct`.
      policies: names to call `make` with.
      meshes: meshes to call it with, such as those of `device_mesh`, all of one kind of
        device.
      device: as for `analyze`.
      memory_fraction: the share of the device's memory that may be used; JAX reserves
        0.75 of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.

    Returns:
      A `PolicyCosts`.

    Raises:
      ValueError: without policies or with no meshes, for a batch whose leaves differ in
        their first axis, for batch sizes that differ between policies, for a
        memory_fraction outside of (0, 1], or for an unknown device.
      MissingPluginError: as for `analyze`.
      RuntimeError: as for `analyze`.

    >>> import jax.numpy as jnp, optax
    >>> import mpjax
    >>> def make(policy):
    ...     tx = mpjax.with_loss_scale(optax.sgd(0.1))
    ...     loss = lambda w, x, key: (jnp.mean((x @ w) ** 2), None)
    ...     state = mpjax.TrainState.create(params=jnp.ones((64, 64)), tx=tx)
    ...     step = mpjax.make_train_step(loss, tx, policy=policy)
    ...     return step, state, jnp.ones((8, 64))
    >>> costs = compare(make, ["float32", "mixed_bfloat16"])
    >>> [sorted(r.matmul_flops) for r in costs.reports.values()]
    [['float32'], ['bfloat16']]
    """
    if not policies:
        raise ValueError("policies is empty; expected names such as 'mixed_float16'.")
    if meshes is not None and not meshes:
        raise ValueError("meshes is empty; leave it out to compare on one device.")
    if not 0 < memory_fraction <= 1:
        raise ValueError(f"memory_fraction={memory_fraction} must be in (0, 1].")
    reports: dict[str, CostReport] = {}
    batch_sizes: dict[str, int] = {}
    largest: dict[str, int | None] = {}
    for mesh in meshes or [None]:
        names = []
        for policy in policies:
            on_mesh = () if mesh is None else (mesh,)
            step, *args = make(policy, *on_mesh)
            name = policy if mesh is None else f"{policy}, {describe_mesh(mesh.shape)}"
            batch_sizes[name] = size_of(args[-1])
            target = choose_device(device, step, args)
            report = reports[name] = analyze(step, *args, device=target)
            usable = int(memory_fraction * (target.memory_bytes or 0))
            largest[name] = (
                _largest_batch(target, step, args, report.peak_bytes, usable)
                if usable
                else None
            )
            names.append(name)
        _refuse_several("batches of different sizes", {batch_sizes[n] for n in names})
    devices = {report.device for report in reports.values()}
    _refuse_several("steps for different devices", devices)
    return PolicyCosts(
        device=devices.pop(),
        reports=reports,
        batch_sizes=batch_sizes,
        largest_batch=largest,
        memory_fraction=memory_fraction,
    )


def half_share(report: CostReport) -> float:
    """Returns the share of a step's matmul FLOPs that are in half precision."""
    half = sum(
        n for dtype, n in report.matmul_flops.items() if is_half(jnp.dtype(dtype))
    )
    return half / max(sum(report.matmul_flops.values()), 1)


def size_of(batch: Any) -> int:
    """Returns the length of the first axis of all leaves of a batch.

    Raises:
      ValueError: if they differ, or there are no leaves.
    """
    sizes = {x.shape[0] if x.shape else None for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            "expected the last argument to be a batch whose leaves have the examples "
            f"along axis 0, got first axes {sorted(map(str, sizes))}."
        )
    return sizes.pop() or 0


def resized(batch: Any, batch_size: int) -> Any:
    """Returns the shapes and dtypes of a batch with another number of examples.

    A `NamedSharding` stays.
    """

    def resize(x):
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            sharding = None
        shape = (batch_size, *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    return jax.tree.map(resize, batch)


def _largest_batch(
    device: Device, step: Any, args: list, peak: int, usable: int
) -> int:
    """Follows the secant of memory over batch size, then confirms by compiling."""
    *rest, batch = args
    num_pieces = _num_pieces(device, step, args)

    def peak_at(batch_size: int) -> int:
        return peak_bytes(compile_for(device, step, *rest, resized(batch, batch_size)))

    low, low_peak = size_of(batch), peak
    high = 2 * low
    high_peak = peak_at(high)
    fits = low if low_peak <= usable else 0
    for _ in range(6):
        slope = max((high_peak - low_peak) / (high - low), 1e-9)
        guess = int(low + (usable - low_peak) / slope)
        multiple = math.lcm(8, num_pieces)
        guess -= guess % (multiple if guess >= max(64, multiple) else num_pieces)
        if guess <= fits or guess < 1:
            break
        low, low_peak, high, high_peak = high, high_peak, guess, peak_at(guess)
        if high_peak <= usable:
            fits = guess
            if high_peak >= 0.99 * usable:
                break
        if high == low:
            break
    return fits


def _num_pieces(device: Device, step: Any, args: list) -> int:
    """Returns in how many pieces the mesh splits the first axis of the batch."""
    mesh = choose_mesh(device, step, args)
    if mesh is None:
        return 1
    batch = place_args(step, tuple(args), mesh)[-1]
    pieces = [
        x.shape[0] // x.sharding.shard_shape(x.shape)[0]
        for x in jax.tree.leaves(batch)
        if x.sharding is not None
    ]
    return math.lcm(*pieces)


def _refuse_several(what: str, values: set) -> None:
    if len(values) > 1:
        raise ValueError(f"make gave {what}: {sorted(values)}.")


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g}"
