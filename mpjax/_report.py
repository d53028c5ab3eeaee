"""Parts that reports share: lines of numbers, and tables, plain or through rich."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from mpjax._jaxpr.core import source_line
from mpjax._tree import is_half


def print_report(report: Any) -> None:
    """Prints through rich on a terminal if rich is installed, else as plain text."""
    try:
        from rich.console import Console
    except ImportError:
        print(report)
        return
    if sys.stdout.isatty():
        Console().print(report)
    else:
        print(report)


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table as text, with its header underlined."""
    cells = [columns, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def rich_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    """Returns a table for rich, half-precision dtypes in green and others in yellow."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, caption_justify="left")
    for row in rows:
        cells = [escape(cell) for cell in row]
        if "dtype" in columns:
            index = columns.index("dtype")
            dtype = getattr(jnp, row[index], None)  # None for a dtype of keys.
            colour = "green" if is_half(dtype) else "yellow"
            cells[index] = f"[{colour}]{cells[index]}[/]"
        table.add_row(*cells)
    return table


def rich_group(*parts: Any) -> Any:
    """Returns texts and tables, one below the other, for rich."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text(x) if isinstance(x, str) else x for x in parts))


def shares(counts: Mapping[str, int], unit: str) -> list[str]:
    """Returns each count in millions and percent: `bfloat16 268 MFLOP (99.9 %)`."""
    total = sum(counts.values()) or 1
    return [
        f"{name} {count / 1e6:.3g} {unit} ({100 * count / total:.1f} %)"
        for name, count in counts.items()
    ]


def short_source(eqn: Any) -> str:
    """Returns the user's source line of an equation, without the directory."""
    return source_line(eqn).rpartition("/")[2].replace(".<locals>", "")


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, cut to 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
