"""What reports share: their lines of numbers, and tables, plain or by rich."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpjax._jaxpr.core import source_line

_HALF = ("bfloat16", "float16")


def print_report(report: Any) -> None:
    """Prints by rich on a terminal where that is installed, else plain."""
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
    """Returns a table as text, its header underlined."""
    cells = [columns, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def rich_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    """Returns a table for rich, with half-precision dtypes in green, others yellow."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, caption_justify="left")
    for row in rows:
        cells = [escape(cell) for cell in row]
        if "dtype" in columns:
            place = columns.index("dtype")
            colour = "green" if row[place] in _HALF else "yellow"
            cells[place] = f"[{colour}]{cells[place]}[/]"
        table.add_row(*cells)
    return table


def rich_group(*parts: Any) -> Any:
    """Returns text and tables one below the other, for rich."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text(x) if isinstance(x, str) else x for x in parts))


def shares(counts: Mapping[str, int], unit: str) -> list[str]:
    """Returns millions and percentages, `bfloat16 268 MFLOP (99.9 %)`."""
    total = sum(counts.values()) or 1
    return [
        f"{name} {count / 1e6:.3g} {unit} ({100 * count / total:.1f} %)"
        for name, count in counts.items()
    ]


def short_source(eqn: Any) -> str:
    """Returns the user's source line of an equation, without the folder."""
    return source_line(eqn).rpartition("/")[2].replace(".<locals>", "")
