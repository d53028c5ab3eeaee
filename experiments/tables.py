"""Writes the tables of README.md from the files in experiments/results.

    python -m experiments.tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is a file
there without its ending.
"""

import re
from pathlib import Path
from typing import Any

from experiments import mnist_convnet
from experiments.benchmarks import accuracy, loss_scales, memory, parity, speed
from experiments.harness import precisions
from experiments.harness.files import read_json
from experiments.harness.results import Column, markdown_table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
COLUMNS: dict[str, tuple[Column, ...]] = {
    accuracy.NAME: accuracy.COLUMNS,
    speed.NAME: speed.COLUMNS,
    loss_scales.NAME: loss_scales.COLUMNS,
    memory.NAME: memory.COLUMNS,
    mnist_convnet.NAME: mnist_convnet.COLUMNS,
    mnist_convnet.PRECISIONS_NAME: precisions.COLUMNS,
    parity.NAME: parity.COLUMNS,
}
TABLE = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def render(text: str) -> str:
    """Returns a Markdown text with its tables made anew.

    Raises:
      WorkdirError: if a result file is missing or damaged.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        table = table_of(read_json(RESULTS / f"{name}.json"))
        return f"<!-- table: {name} -->\n{table}<!-- end -->"

    return TABLE.sub(replace, text)


def table_of(result: dict[str, Any]) -> str:
    """Returns the table of a result file, with a line that says where it was made."""
    where = result["environment"]
    versions = where["versions"]
    made = (
        f"`{where['command']}` on {where['device']}, Python {where['python']}, "
        f"jax {versions['jax']}, flax {versions['flax']}, optax {versions['optax']}, "
        f"float32 matmul precision {where['float32_matmul_precision']}."
    )
    columns = COLUMNS[result["experiment"]]
    left_out = result.get("left_out", {})
    missing = "".join(
        f"Left out: {name} ({why}).\n\n" for name, why in left_out.items()
    )
    return f"\n{markdown_table(columns, result['runs'])}\n{missing}{made}\n"


def main() -> None:
    """Rewrites README.md."""
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))


if __name__ == "__main__":
    main()
