"""Runs the programs in Markdown pages, and checks what they print.

All ```python blocks of a page run in their order in one namespace. A ```text block that
follows directly holds what the block before it prints; `...` stands for anything, as in
a doctest.
"""

import contextlib
import doctest
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n*^```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def pages() -> list[str]:
    """Returns README.md and every page of the site that holds programs."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        str(path.relative_to(ROOT))
        for path in paths
        if "_build" not in path.parts and BLOCK.search(path.read_text())
    ]


def run_page(page: str) -> dict:
    """Runs a page; returns the namespace of its programs.

    Raises:
      AssertionError: if a program prints something else than the page says.
    """
    text = (ROOT / page).read_text()
    namespace: dict = {"__name__": "__main__"}
    for match in BLOCK.finditer(text):
        first_line = text[: match.start("code")].count("\n")
        program = compile("\n" * first_line + match["code"], page, "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(program, namespace)
        if match["output"] is not None:
            check = doctest.OutputChecker().check_output
            assert check(match["output"], printed.getvalue(), OPTIONS), (
                f"{page}, line {first_line + 1}: the page says\n{match['output']}\n"
                f"and the program prints\n{printed.getvalue()}"
            )
    return namespace
