"""The notebooks of colab/: read, and executed as a reader would, with less to train.

python -m helpers.notebooks 1_quickstart DIRECTORY      # executes one
"""

import concurrent.futures
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import filelock
import nbclient
import nbformat
from helpers import cli_runs

COLAB = cli_runs.ROOT / "colab"
NAMES = tuple(sorted(path.stem for path in COLAB.glob("*.ipynb")))
MAX_AT_ONCE = 2
CELL_LIMIT_S = 180
NOTEBOOK_LIMIT_S = 300

# What the tests set after the cell of parameters: seconds instead of minutes.
PARAMETERS: dict[str, dict[str, Any]] = {
    "1_quickstart": {"NUM_UNITS": 128, "NUM_STEPS": 150},
    "2_keras_guide": {
        "DATASET": "digits",
        "NUM_UNITS": 128,
        "BATCH_SIZE": 256,
        "NUM_EPOCHS": 6,
        "MATMUL_SIZES": (64, 128, 256),
    },
    "3_loss_scaling": {
        "NUM_UNITS": 64,
        "NUM_EXAMPLES": 1024,
        "NUM_STEPS": 600,
        "NUM_SCENES": 160,
        "PRESET": "tiny",
        "DIGITS": "digits",
    },
    "4_mandarin_speech": {
        "NUM_TRAIN": 300,
        "NUM_TEST": 20,
        "NUM_SYLLABLES": 8,
        "NUM_EPOCHS": 6,
        "NUM_UNITS": 32,
        "NUM_LAYERS": 1,
        "NUM_BUCKETS": 1,
        "BATCH_SIZE": 16,
        "LEARNING_RATE": 1e-2,
    },
    "5_autocast_your_model": {
        "NUM_EXAMPLES": 128,
        "WIDTH": 64,
        "LENGTHS": (8, 32, 128),
    },
    "6_four_precisions": {"NUM_IMAGES": 500},
}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[int]:
    """Returns the positions of the cells that have a tag."""
    return [
        position
        for position, cell in enumerate(notebook.cells)
        if tag in cell.metadata.get("tags", [])
    ]


def execute_once(directory: Path) -> Path:
    """Executes every notebook, unless another process has done so; returns directory.

    It then holds the executed copies, also of those that failed: these end with the
    error, and have a text NAME.error beside them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    done = directory / "done"
    limit_s = NOTEBOOK_LIMIT_S * len(NAMES)
    with filelock.FileLock(directory / ".lock", timeout=limit_s):
        if not done.exists():
            with concurrent.futures.ThreadPoolExecutor(MAX_AT_ONCE) as pool:
                list(pool.map(lambda name: _execute_apart(name, directory), NAMES))
            done.touch()
    return directory


def execute(name: str, directory: Path, parameters: dict[str, Any]) -> Path:
    """Executes one notebook, and returns its executed copy.

    Args:
      name: its name in colab/.
      directory: where the copy goes.
      parameters: what a cell behind the one tagged `parameters` sets.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell fails; the copy is written.
      nbclient.exceptions.CellTimeoutError: if it takes longer than the limits.
    """
    notebook = read(COLAB / f"{name}.ipynb")
    (position,) = tagged(notebook, "parameters")
    notebook.cells.insert(position + 1, _cell(parameters))
    work = directory / "work" / name
    work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + NOTEBOOK_LIMIT_S
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        timeout_func=lambda _: min(CELL_LIMIT_S, max(1, deadline - time.monotonic())),
        resources={"metadata": {"path": str(work)}},
    )
    copy = directory / f"{name}.ipynb"
    try:
        client.execute(env=environment())
    finally:
        _remove_progress_bars(notebook)
        nbformat.write(notebook, copy)
    return copy


def environment() -> dict[str, str]:
    """Returns an environment whose Python finds mpjax and the experiments."""
    caches = {k: v for k, v in os.environ.items() if k.startswith("JAX_COMPILATION")}
    kept = cli_runs.environment() | caches | {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    return {name: value for name, value in kept.items() if name != "MPLBACKEND"}


def texts(notebook: nbformat.NotebookNode, stream: str = "stdout") -> str:
    """Returns what all cells have printed."""
    return "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == stream
    )


def images(cell: nbformat.NotebookNode) -> list[str]:
    """Returns the pictures of a cell, as PNG in base 64."""
    return [
        output.data["image/png"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def _execute_apart(name: str, directory: Path) -> None:
    """Executes a notebook in a process of its own, which nbclient's loops end with."""
    paths = os.pathsep.join(map(str, (cli_runs.ROOT, cli_runs.ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-m", "helpers.notebooks", name, str(directory)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        (directory / f"{name}.error").write_text(done.stdout + done.stderr)


def _remove_progress_bars(notebook: nbformat.NotebookNode) -> None:
    """Removes what a reader no longer sees: a bar is closed when its run ends."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if "application/vnd.jupyter.widget-view+json"
                not in output.get("data", {})
            ]


def _cell(parameters: dict[str, Any]) -> nbformat.NotebookNode:
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    return nbformat.NotebookNode(
        cell_type="code",
        execution_count=None,
        metadata=nbformat.NotebookNode(tags=["remove-input"]),
        outputs=[],
        source="\n".join(lines),
    )


if __name__ == "__main__":
    execute(sys.argv[1], Path(sys.argv[2]), PARAMETERS[sys.argv[1]])
