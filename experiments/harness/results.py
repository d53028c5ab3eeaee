"""Results of a comparison: result.json, tables, and the machine that made them."""

import dataclasses
import importlib.metadata
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import rich.console
import rich.table

from experiments.harness.command import command_line
from experiments.harness.config import BaseConfig, matmul_dtype
from experiments.harness.devices import make_devices
from experiments.harness.emulation import Hardware, emulation_note, float8_note
from experiments.harness.files import read_json, translate_os_errors, write_json
from experiments.harness.processes import largest
from experiments.harness.stop import Interrupted, on_signals
from experiments.harness.workdir import extension_note, open_workdir
from mpjax._autocast.float8_devices import multiplies_float8

# Names in /proc/cpuinfo, the widest first.
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
Side = Literal["left", "right"]
PACKAGES = ("mpjax", "jax", "jaxlib", "flax", "optax", "jmp", "numpy")


@dataclasses.dataclass(frozen=True)
class Result:
    """What an experiment returns.

    Attributes:
      experiment: name of the experiment.
      workdir: the working directory.
      config: the settings that two equal runs share.
      environment: device, versions, commit, float32 matmul precision, command.
      runs: one dictionary of plain values per policy.
    """

    experiment: str
    workdir: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    runs: list[dict[str, Any]]

    def run(self, policy: str) -> dict[str, Any]:
        """Returns the run of a policy.

        Raises:
          KeyError: if there is none.
        """
        for run in self.runs:
            if run["policy"] == policy:
                return run
        raise KeyError(f"no run of {policy!r}")

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return dataclasses.asdict(self) | {"workdir": str(self.workdir)}


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      heading: text above the column.
      key: key of the value in a run.
      format: format string or function of the value.
    """

    heading: str
    key: str
    format: str | Callable[[Any], str] = "{}"

    def text(self, run: dict[str, Any]) -> str:
        """Returns the cell of a run; a dash if it has no value."""
        value = run.get(self.key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        if isinstance(self.format, str):
            return self.format.format(value)
        return self.format(value)


def run_policies(
    experiment: str,
    config: BaseConfig,
    train_one: Callable[[BaseConfig, str, Path], dict[str, Any]],
    names: Sequence[str] | None = None,
) -> Result:
    """Runs every policy of the config in a directory of its own, and writes the result.

    When a comparison is resumed, policies that have a result are not run again. The
    result of a finished comparison is returned unchanged. What a reader of the result
    should know is printed, and stands in `notes` of its environment.

    Args:
      experiment: name of the experiment.
      config: the settings; a `workdir` of None makes a new one.
      train_one: `(config, policy, directory) -> run`; this config has a `workdir`.
      names: names of other runs than one per policy, instead of the policies'. Where
        they are others than those of an earlier call, the result is written anew.

    Raises:
      WorkdirError: if the working directory cannot be used.
      Interrupted: after a signal; what is finished or saved is kept.
    """
    with (
        open_workdir(config, experiment) as workdir,
        on_signals() as stop,
        translate_os_errors(workdir.path),
    ):
        config = dataclasses.replace(config, workdir=workdir.path)
        made_in = environment() | {"mesh": make_devices(config).axes()}
        file = workdir.path / "result.json"
        if not file.exists():
            made_in["notes"] = _notes(config)
            for note in made_in["notes"]:
                print(f"note: {note}", flush=True)
        runs = []
        for name in config.policy_names() if names is None else names:
            directory = workdir.path / name
            done = directory / "result.json"
            if not done.exists():
                if number := largest(stop.signal_number or 0):
                    kept = f"not yet begun with {name}"
                    raise Interrupted(number, kept, config.resume_flags())
                workdir.make_directory(name)
                write_json(done, train_one(config, name, directory))
            elif config.resume:
                print(f"{name}: finished before, not run again", flush=True)
            runs.append(read_json(done))
        if not file.exists() or (names is not None and read_json(file)["runs"] != runs):
            result = Result(
                experiment, workdir.path, config.comparable(), made_in, runs
            )
            write_json(file, result.to_json())
        return Result(**read_json(file) | {"workdir": workdir.path})


def _notes(config: BaseConfig) -> list[str]:
    """Returns what is worth a line before the training begins."""
    assert config.workdir is not None
    device, workdir = hardware(), config.workdir
    dtypes = {name: matmul_dtype(name) for name in config.policy_names()}
    emulated = emulation_note(device, dtypes), float8_note(device, dtypes)
    notes = (*emulated, extension_note(workdir))
    return [note for note in notes if note is not None]


def environment(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Returns the device, versions, commit, matmul precision and command."""
    device = jax.devices()[0]
    precision = jax.config.values["jax_default_matmul_precision"]
    return {
        "device": device.device_kind if device.platform != "cpu" else _cpu(),
        "platform": device.platform,
        "machine": machine(),
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "backend": device.client.platform_version,
        "commit": _commit(),
        "float32_matmul_precision": precision or "default",
        "command": command_line(),
    }


def print_table(title: str, columns: Sequence[Column], runs: list[dict[str, Any]]):
    """Prints runs as a table on stdout; in a narrow terminal, a column for each run."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=200)
    rows = [[column.heading for column in columns]]
    rows += [[column.text(run) for column in columns] for run in runs]
    table = _table(title, rows, [_side(column, runs) for column in columns])
    if _width(table, console) > console.width:
        columns_as_rows = [list(cells) for cells in zip(*rows, strict=True)]
        sides: list[Side] = ["left", *("right" for _ in runs)]
        turned = _table(title, columns_as_rows, sides)
        if _width(turned, console) <= console.width:
            table = turned
    console.print(table)


def _side(column: Column, runs: list[dict[str, Any]]) -> Side:
    is_text = bool(runs) and isinstance(runs[0].get(column.key), str)
    return "left" if is_text else "right"


def _table(
    title: str, rows: list[list[str]], justify: Sequence[Side]
) -> rich.table.Table:
    """Returns a table whose first row are the headings."""
    table = rich.table.Table(title=title, title_justify="left")
    for heading, side in zip(rows[0], justify, strict=True):
        table.add_column(heading, justify=side)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _width(table: rich.table.Table, console: rich.console.Console) -> int:
    """Returns how wide a table would be if nothing in it were cut."""
    options = console.options.update(max_width=10_000)
    return console.measure(table, options=options).maximum


def markdown_table(columns: Sequence[Column], runs: list[dict[str, Any]]) -> str:
    """Returns runs as a Markdown table, without columns that no run has a value for."""
    has_value = lambda column: any(run.get(column.key) is not None for run in runs)
    columns = [column for column in columns if not runs or has_value(column)]
    rows = [[column.heading for column in columns]]
    rows.append(["---"] * len(columns))
    rows += [[column.text(run) for column in columns] for run in runs]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def median(values: list[float]) -> float | None:
    """Returns the upper median, which is one of the values; None if there are none."""
    return sorted(values)[len(values) // 2] if values else None


def machine() -> str:
    """Returns a file name for the GPU, or for the CPU's widest instructions."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "_".join(filter(None, ["cpu", _instructions()]))
    return re.sub(r"\W+", "_", device.device_kind.lower())


def hardware() -> Hardware:
    """Returns what decides how fast half precision is here."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    return Hardware(
        device.platform,
        _cpu_flags(),
        capability,
        jax.__version_info__,
        multiplies_float8(device.platform, device.device_kind, capability),
    )


def _cpu() -> str:
    """Returns name, threads and widest instructions, which decide how fast half is."""
    names = _cpu_info("model name")
    name = names[0] if names else platform.processor() or platform.machine()
    details = [f"{len(names) or os.cpu_count()} threads", _instructions()]
    return f"{name} ({', '.join(filter(None, details))})"


def _instructions() -> str | None:
    flags = _cpu_flags()
    return next((name for name in _INSTRUCTIONS if name in flags), None)


def _cpu_flags() -> list[str]:
    return " ".join(_cpu_info("flags")[:1]).split()


def _cpu_info(field: str) -> list[str]:
    """Returns a field of /proc/cpuinfo, a value per thread; [] without that file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return [value.strip() for name, value in pairs if name.strip() == field]


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    """Returns None if the package is not installed, as mpjax in its own checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
