"""Writes the tables of README.md and docs/ from the result files.

    python -m experiments.tables            # writes the pages
    python -m experiments.tables --check    # changes nothing

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is the name
of a result file without its ending, or `summary`: the main results of several. All else
in a page stays as it is.
"""

from experiments.configs.tables import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.tables", Config, doc=__doc__)

import json
import re
from pathlib import Path
from typing import Any

from experiments import (
    _summary,
    mnist_convnet,
    mnist_mlp,
    speech_ctc,
    speech_updates,
    speech_updates_table,
    ssd_digits,
    ssd_scales,
    ssd_scales_table,
)
from experiments.benchmarks import (
    _accuracy_float8,
    _accuracy_real,
    _memory_by_hand,
    _memory_float8,
    accuracy,
    convolutions,
    float8,
    loss_curves,
    loss_scales,
    memory,
    parity,
    recurrence,
    scaling,
    speech_profile,
    speed,
)
from experiments.harness import gradient_summary, numerics_summary, precisions
from experiments.harness.errors import ExperimentError
from experiments.harness.files import write_text
from experiments.harness.results import Column, markdown_table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
COLUMNS: dict[str, tuple[Column, ...]] = {
    accuracy.NAME: accuracy.COLUMNS,
    _accuracy_float8.NAME: _accuracy_float8.COLUMNS,
    _accuracy_real.NAME: _accuracy_real.COLUMNS,
    speed.NAME: speed.COLUMNS,
    convolutions.NAME: convolutions.COLUMNS,
    float8.NAME: float8.COLUMNS,
    loss_curves.NAME: loss_curves.COLUMNS,
    loss_scales.NAME: loss_scales.COLUMNS,
    memory.NAME: memory.COLUMNS,
    _memory_by_hand.NAME: _memory_by_hand.COLUMNS,
    _memory_float8.NAME: _memory_float8.COLUMNS,
    mnist_convnet.NAME: mnist_convnet.COLUMNS,
    mnist_convnet.PRECISIONS_NAME: precisions.COLUMNS,
    mnist_mlp.NUMERICS_NAME: numerics_summary.COLUMNS,
    parity.NAME: parity.COLUMNS,
    recurrence.NAME: recurrence.COLUMNS,
    scaling.NAME: scaling.COLUMNS,
    speech_profile.NAME: speech_profile.COLUMNS,
    speech_ctc.NAME: speech_ctc.make_experiment().columns(),
    speech_updates.NAME: speech_updates_table.COLUMNS,
    ssd_digits.NAME: ssd_digits.make_experiment().columns(),
    ssd_digits.GRADIENTS_NAME: gradient_summary.COLUMNS,
    ssd_scales.NAME: ssd_scales_table.COLUMNS,
}
TABLE = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def main(config: Config) -> list[str]:
    """Writes the tables of all pages, or checks them.

    Returns:
      The names of the tables that were out of date.

    Raises:
      ExperimentError: if a result file is missing or damaged; with `check`, also if
        a table is out of date.
    """
    rendered = {}
    outdated = []
    for page in pages():
        old = page.read_text()
        new = render(old)
        pairs = zip(TABLE.finditer(old), TABLE.finditer(new), strict=True)
        names = [before[1] for before, after in pairs if before[0] != after[0]]
        if names:
            rendered[page] = new
            outdated += names
    if outdated and config.check:
        raise ExperimentError(
            f"tables are out of date: {', '.join(outdated)}. "
            "`python -m experiments.tables` writes them."
        )
    for page, new in rendered.items():
        write_text(page, new)
        print(f"written: {page}")
    if not outdated:
        print("all tables are up to date")
    return outdated


def pages() -> list[Path]:
    """Returns the pages that may have tables: README.md and those of docs/."""
    paths = sorted((ROOT / "docs").rglob("*.md"))
    return [ROOT / "README.md", *(p for p in paths if "_build" not in p.parts)]


def render(text: str) -> str:
    """Returns a Markdown text with its tables made anew.

    Raises:
      ExperimentError: if a result file is missing or damaged.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        path = RESULTS / f"{name}.json"
        try:
            table = (
                _summary.render(RESULTS)
                if name == "summary"
                else render_result(json.loads(path.read_text()))
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ExperimentError(
                f"cannot make a table of {path} ({type(error).__name__}: {error}); "
                "restore the file, or make it anew with the command that it names."
            ) from error
        return f"<!-- table: {name} -->\n{table}<!-- end -->"

    return TABLE.sub(replace, text)


def render_result(result: dict[str, Any]) -> str:
    """Returns the table of a result file, with a line that says how it was made."""
    result = in_todays_names(result)
    environment = result["environment"]
    versions = environment["versions"]
    command, today = environment["command"], environment["command_today"]
    made = (
        f"`{command}`{'' if today == command else f' (today `{today}`)'} on "
        f"{environment['device']}, Python {environment['python']}, jax "
        f"{versions['jax']}, flax {versions['flax']}, optax {versions['optax']}, "
        f"float32 matmul precision {environment['float32_matmul_precision']}."
    )
    columns = COLUMNS[result["experiment"]]
    left_out = result.get("left_out", {})
    missing = "".join(
        f"Left out: {name} ({reason}).\n\n" for name, reason in left_out.items()
    )
    return f"\n{markdown_table(columns, result['runs'])}\n{missing}{made}\n"


def in_todays_names(result: dict[str, Any]) -> dict[str, Any]:
    """Returns what a result file holds, in today's names.

    A file that was made before an experiment, module, flag or key was renamed says so
    in `renamed_from`: today's name → the name then. Its `command` stays as it was run;
    `command_today` is added beside it: the same command in today's names.
    """
    names = {then: today for today, then in result.get("renamed_from", {}).items()}

    def rename(values: dict[str, Any]) -> dict[str, Any]:
        return {names.get(key, key): value for key, value in values.items()}

    def reword(text: str) -> str:
        for then, today in names.items():
            if then.startswith("--"):
                text = text.replace(then, today)
        return text

    experiment, environment = result["experiment"], result["environment"]
    left_out = result.get("left_out", {})
    words = environment["command"].split()
    command_today = " ".join(names.get(word, word) for word in words)
    return rename(result) | {
        "experiment": names.get(experiment, experiment),
        "environment": environment | {"command_today": command_today},
        "runs": [rename(run) for run in result["runs"]],
        "left_out": {name: reword(why) for name, why in left_out.items()},
    }
