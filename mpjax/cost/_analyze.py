"""What a call of a function costs: memory, arithmetic, traffic, communication, time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from mpjax._autocast.float8_devices import tracing_for
from mpjax._jaxpr.primitives import MATMULS
from mpjax._report import plain_table, print_report, rich_group, rich_table, shares
from mpjax.cost._collectives import Collective, find_collectives
from mpjax.cost._compile import compile_for, peak_bytes
from mpjax.cost._devices import Device
from mpjax.cost._hlo import moved_bytes
from mpjax.cost._mesh import (
    choose_device,
    choose_mesh,
    describe_mesh,
    find_mesh,
    num_sharing,
    place_args,
)
from mpjax.numerics import precision_report

_SENT_COLUMNS = (
    "collective",
    "dtype",
    "axes",
    "devices",
    "calls",
    "sent, MB",
    "by",
    "ms",
)


@dataclasses.dataclass(frozen=True)
class CostReport:
    """What one call costs; `print(report)`, `report.print()`, `report.to_dict()`.

    On a mesh every figure is that of one device. Times are modelled, not measured.

    Attributes:
      device: name of the device.
      mesh: sizes of the mesh's axes by name; None for a single device.
      argument_bytes: size of all arguments.
      output_bytes: size of all results.
      alias_bytes: size of the results that reuse the memory of donated arguments.
      temporary_bytes: memory that XLA needs beside arguments and results.
      peak_bytes: memory needed at once: arguments, results that do not reuse an
        argument's memory, and temporaries.
      moved_bytes: bytes read from and written to memory; see `analyze`.
      matmul_flops: FLOPs of matmuls and convolutions, by dtype of their operands.
      other_flops: FLOPs of all other operations, by dtype.
      collectives: what is sent to other devices, by collective, dtype and mesh axes, a
        `Collective` each, the most bytes first.
      compute_s: seconds for the arithmetic at the device's peak; None if unknown.
      memory_s: seconds to move the bytes at the device's bandwidth; None if unknown.
      communication_s: seconds to send the bytes at the bandwidth of NVLink or network;
        None if unknown.
      memory_bytes: memory of the device; None if unknown.
      float32_matmul_precision: the setting that decides whether float32 matmuls count
        as TF32.
    """

    device: str
    mesh: dict[str, int] | None
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    moved_bytes: int
    matmul_flops: dict[str, int]
    other_flops: dict[str, int]
    collectives: tuple[Collective, ...]
    compute_s: float | None
    memory_s: float | None
    communication_s: float | None
    memory_bytes: int | None
    float32_matmul_precision: str

    @property
    def flops(self) -> int:
        """All floating-point operations."""
        return sum(self.matmul_flops.values()) + sum(self.other_flops.values())

    @property
    def sent_bytes(self) -> int:
        """Bytes that a device sends to others, of all collectives."""
        return sum(c.sent_bytes for c in self.collectives)

    @property
    def roofline_s(self) -> float | None:
        """The larger of `compute_s` and `memory_s`, a lower bound; None if unknown."""
        if self.compute_s is None or self.memory_s is None:
            return None
        return max(self.compute_s, self.memory_s)

    @property
    def bound(self) -> str | None:
        """What bounds the roofline time: "compute" or "memory"; None if unknown."""
        if self.compute_s is None or self.memory_s is None:
            return None
        return "compute" if self.compute_s >= self.memory_s else "memory"

    @property
    def best_s(self) -> float | None:
        """Seconds if all communication overlaps the rest; None if unknown."""
        if self.roofline_s is None or self.communication_s is None:
            return None
        return max(self.roofline_s, self.communication_s)

    @property
    def worst_s(self) -> float | None:
        """Seconds if no communication overlaps the rest; None if unknown."""
        if self.roofline_s is None or self.communication_s is None:
            return None
        return self.roofline_s + self.communication_s

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, ready for JSON."""
        derived = ("flops", "sent_bytes", "roofline_s", "bound", "best_s", "worst_s")
        return dataclasses.asdict(self) | {
            name: getattr(self, name) for name in derived
        }

    def print(self) -> None:
        """Prints the report, through rich on a terminal if rich is installed."""
        print_report(self)

    def __rich__(self) -> Any:
        tables = [rich_table(columns, rows) for columns, rows in self._tables()]
        return rich_group(self._title(), *tables, self._end())

    def __str__(self) -> str:
        tables = [plain_table(columns, rows) for columns, rows in self._tables()]
        return "\n".join([self._title(), *tables, self._end()])

    def _title(self) -> str:
        matmuls = ", ".join(shares(self.matmul_flops, "MFLOP")) or "none"
        if self.mesh is None:
            return f"{self.device}; matmuls: {matmuls}"
        return f"each of {describe_mesh(self.mesh)} {self.device}; matmuls: {matmuls}"

    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        sent = [(_SENT_COLUMNS, [_sent_row(c) for c in self.collectives])]
        return [(("", "MB"), self._rows()), *(sent if self.collectives else ())]

    def _rows(self) -> list[tuple[str, ...]]:
        rows = {
            "arguments": self.argument_bytes,
            "results": self.output_bytes,
            "results in donated arguments": self.alias_bytes,
            "temporaries": self.temporary_bytes,
            "peak": self.peak_bytes,
            "moved": self.moved_bytes,
        }
        return [(name, f"{number / 1e6:.1f}") for name, number in rows.items()]

    def _end(self) -> str:
        if self.roofline_s is None:
            return "no roofline time: the peaks of this device are not known"
        roofline = (
            f"roofline time {_ms(self.roofline_s)}, bound by {self.bound} (arithmetic "
            f"{_ms(self.compute_s)}, memory {_ms(self.memory_s)}; float32 matmul "
            f"precision {self.float32_matmul_precision})"
        )
        if not self.collectives:
            return roofline
        if self.communication_s is None:
            return f"{roofline}\nno time of communication: the links are not known"
        return (
            f"{roofline}\ncommunication {_ms(self.communication_s)}; modelled time of a"
            f" call {_ms(self.best_s)} if it all overlaps, {_ms(self.worst_s)} if none"
        )


def analyze(
    step: Callable[..., Any], *args: Any, device: str | Device | None = None
) -> CostReport:
    """Tells what one call of a function costs, without running it.

    It takes the function with its arguments, `analyze(step, state, batch)`, and returns
    the report.

    The function is compiled, also for a GPU you don't have: that needs JAX's CUDA
    plugin (`pip install "jax[cuda13]"`) and, on a machine without a GPU,
    `JAX_PLATFORMS=cpu`.

    FLOPs are counted in the function as traced (as `precision_report` does: a scan
    times its length, a `while` once). Bytes moved are counted in the compiled code:
    each kernel reads its operands and writes its results. The time is a roofline
    (Williams, Waterman, Patterson 2009): the larger of all arithmetic at the peak of
    its dtype, with matmuls on matrix units, and all traffic at full bandwidth.

    A step on a mesh (`make_train_step(mesh=mesh)`), also one of `device_mesh`, is
    compiled for it; so is a function whose arguments are sharded. All figures are then
    those of one device. Memory, traffic and what is sent are read from the code that
    XLA made for it. FLOPs are an even share: those of the function, divided by the
    number of devices along the axes over which some argument is split. So what these
    devices all do, such as updates of replicated parameters, counts too little; and so
    does `shard_map`, whose inside is counted for one device already.

    The time of communication is modelled: what a device sends by the ring algorithm
    (`Collective`), at the full bandwidth of a link in one direction, without latency.
    Devices are numbered node by node, eight to a node. A group inside of a node sends
    by NVLink, any other by the network, for which each device has an adapter. As a ring
    leaves a node once, those of its devices that are in one node share their adapters.

    Args:
      step: any function, jitted or not; donated arguments count once.
      *args: its arguments; arrays, `jax.ShapeDtypeStruct` or numbers. Of a step with a
        mesh, those that have no `NamedSharding` are placed as
        `mpjax.sharding.state_sharding` and `batch_sharding` say.
      device: "v100", "a100", "h100", "h200", "b200", a `Device`, or None for the device
        of the mesh, without one JAX's default device.

    Returns:
      A `CostReport`; times are in seconds, sizes in bytes.

    Raises:
      ValueError: for an unknown name of a device, or one that is not the mesh's.
      MissingPluginError: if the CUDA plugin is not installed or does not start; it says
        what to do.
      RuntimeError: if XLA cannot compile the function for that GPU.
    """
    target = choose_device(device, step, args)
    mesh = choose_mesh(target, step, args)
    compiled = compile_for(target, step, *args)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    moved = moved_bytes(text)
    share = 1 if mesh is None else num_sharing(place_args(step, args, mesh), mesh)
    with tracing_for(another_device=target.target is not None):
        matmul_flops, other_flops = _count_flops(step, args, share)
    precision = float32_matmul_precision()
    bandwidth = target.bandwidth_bytes_per_s
    if mesh is None:  # A `shard_map` may know one.
        mesh = find_mesh(None, compiled.output_shardings)
    collectives = find_collectives(text, target, mesh)
    sending_s = [c.seconds for c in collectives if c.seconds is not None]
    is_timed = len(sending_s) == len(collectives)
    return CostReport(
        device=target.name,
        mesh=None if mesh is None else dict(mesh.shape),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak_bytes(compiled),
        moved_bytes=moved,
        matmul_flops=matmul_flops,
        other_flops=other_flops,
        collectives=collectives,
        compute_s=_compute_s(target, matmul_flops, other_flops, precision),
        memory_s=moved / bandwidth if bandwidth else None,
        communication_s=sum(sending_s, 0.0) if is_timed else None,
        memory_bytes=target.memory_bytes,
        float32_matmul_precision=precision,
    )


def float32_matmul_precision() -> str:
    """Returns the setting `jax_default_matmul_precision`; "default" if unset."""
    config: Any = jax.config
    return config.jax_default_matmul_precision or "default"


def _count_flops(
    step: Any, args: tuple, share: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns a share of the FLOPs of matmuls, and of the rest, by dtype."""
    matmul: dict[str, int] = {}
    other: dict[str, int] = {}
    for record in precision_report(step)(*args).records:
        if record.flops:
            counts = matmul if record.primitive in MATMULS else other
            counts[record.dtype] = counts.get(record.dtype, 0) + record.flops
    return _divide(matmul, share), _divide(other, share)


def _compute_s(
    device: Device,
    matmul_flops: dict[str, int],
    other_flops: dict[str, int],
    precision: str,
) -> float | None:
    """Returns the seconds at the device's peaks; None if one is unknown."""
    counts = [
        (flops, device.matmul_flops_per_s(dtype, precision))
        for dtype, flops in matmul_flops.items()
    ]
    counts += [
        (flops, device.vector_flops_per_s(dtype))
        for dtype, flops in other_flops.items()
    ]
    is_known = all(peak for _, peak in counts)
    return sum(flops / peak for flops, peak in counts) if is_known else None


def _divide(counts: dict[str, int], share: int) -> dict[str, int]:
    return {name: count // share for name, count in counts.items()}


def _sent_row(c: Collective) -> tuple[str, ...]:
    link = {None: "-", True: "node", False: "network"}[c.is_within_node]
    seconds = "-" if c.seconds is None else f"{1e3 * c.seconds:.3g}"
    counts = str(c.group_size), str(c.num_calls), f"{c.sent_bytes / 1e6:.1f}"
    return c.name, c.dtype, ", ".join(c.axes) or "-", *counts, link, seconds


def _ms(seconds: float | None) -> str:
    return f"{1e3 * (seconds or 0):.3g} ms"
