"""What one call of a function costs: memory, arithmetic, traffic, roofline time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from mpjax._jaxpr.primitives import MATMULS
from mpjax._report import plain_table, print_report, rich_group, rich_table, shares
from mpjax.cost._compile import compile_for, peak_bytes
from mpjax.cost._devices import Device, get_device
from mpjax.cost._hlo import moved_bytes
from mpjax.numerics import precision_report


@dataclasses.dataclass(frozen=True)
class CostReport:
    """What one call costs; `print(report)`, `report.print()`, `report.to_dict()`.

    Attributes:
      device: name of the device.
      argument_bytes: size of all arguments.
      output_bytes: size of all results.
      alias_bytes: size of the results that reuse the memory of donated arguments.
      temporary_bytes: memory that XLA needs beside arguments and results.
      peak_bytes: memory needed at once: arguments, results that do not reuse an
        argument's memory, and temporaries.
      moved_bytes: bytes read from and written to memory; see `analyze`.
      matmul_flops: FLOPs of matmuls and convolutions, by dtype of their operands.
      other_flops: FLOPs of all other operations, by dtype.
      compute_s: seconds for the arithmetic at the device's peak; None if unknown.
      memory_s: seconds to move the bytes at the device's bandwidth; None if unknown.
      memory_bytes: memory of the device; None if unknown.
      float32_matmul_precision: the setting that decides whether float32 matmuls count
        as TF32.
    """

    device: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    moved_bytes: int
    matmul_flops: dict[str, int]
    other_flops: dict[str, int]
    compute_s: float | None
    memory_s: float | None
    memory_bytes: int | None
    float32_matmul_precision: str

    @property
    def flops(self) -> int:
        """All floating-point operations."""
        return sum(self.matmul_flops.values()) + sum(self.other_flops.values())

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

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, ready for JSON."""
        derived = ("flops", "roofline_s", "bound")
        return dataclasses.asdict(self) | {
            name: getattr(self, name) for name in derived
        }

    def print(self) -> None:
        """Prints the report, through rich on a terminal if rich is installed."""
        print_report(self)

    def __rich__(self) -> Any:
        return rich_group(
            self._title(), rich_table(("", "MB"), self._rows()), self._end()
        )

    def __str__(self) -> str:
        table = plain_table(("", "MB"), self._rows())
        return "\n".join([self._title(), table, self._end()])

    def _title(self) -> str:
        matmuls = ", ".join(shares(self.matmul_flops, "MFLOP")) or "none"
        return f"{self.device}; matmuls: {matmuls}"

    def _rows(self) -> list[tuple[str, str]]:
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
        return (
            f"roofline time {1e3 * self.roofline_s:.3g} ms, bound by {self.bound} "
            f"(arithmetic {1e3 * (self.compute_s or 0):.3g} ms, memory "
            f"{1e3 * (self.memory_s or 0):.3g} ms; float32 matmul precision "
            f"{self.float32_matmul_precision})"
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

    Args:
      step: any function, jitted or not; donated arguments count once.
      *args: its arguments; arrays, `jax.ShapeDtypeStruct` or numbers.
      device: "v100", "a100", "h100", "h200", "b200", a `Device`, or None for JAX's
        default device.

    Returns:
      A `CostReport`; times are in seconds, sizes in bytes.

    Raises:
      ValueError: for an unknown name of a device.
      MissingPluginError: if the CUDA plugin is not installed or does not start; it says
        what to do.
      RuntimeError: if XLA cannot compile the function for that GPU.
    """
    target = get_device(device)
    compiled = compile_for(target, step, *args)
    memory = compiled.memory_analysis()
    moved = moved_bytes(compiled.as_text())
    matmul_flops, other_flops = _count_flops(step, args)
    precision = float32_matmul_precision()
    seconds = [
        *(
            (flops, target.matmul_flops_per_s(dtype, precision))
            for dtype, flops in matmul_flops.items()
        ),
        *(
            (flops, target.vector_flops_per_s(dtype))
            for dtype, flops in other_flops.items()
        ),
    ]
    is_known = all(peak for _, peak in seconds)
    bandwidth = target.bandwidth_bytes_per_s
    return CostReport(
        device=target.name,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak_bytes(compiled),
        moved_bytes=moved,
        matmul_flops=matmul_flops,
        other_flops=other_flops,
        compute_s=sum(f / peak for f, peak in seconds) if is_known else None,
        memory_s=moved / bandwidth if bandwidth else None,
        memory_bytes=target.memory_bytes,
        float32_matmul_precision=precision,
    )


def float32_matmul_precision() -> str:
    """Returns the setting `jax_default_matmul_precision`; "default" if unset."""
    config: Any = jax.config
    return config.jax_default_matmul_precision or "default"


def _count_flops(step: Any, args: tuple) -> tuple[dict[str, int], dict[str, int]]:
    matmul: dict[str, int] = {}
    other: dict[str, int] = {}
    for record in precision_report(step)(*args).records:
        if record.flops:
            counts = matmul if record.primitive in MATMULS else other
            counts[record.dtype] = counts.get(record.dtype, 0) + record.flops
    return matmul, other
