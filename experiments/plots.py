"""Draws the pictures of the results, and of README.md, from the files.

    python -m experiments.plots                     # all of them, in 30 s
    python -m experiments.plots --only speed        # where the name matches

Every picture is drawn from the result file of the same name, and none is trained for.
The one at the top of README.md is docs/_static/headline.png.
"""

from experiments.configs.plots import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.plots", Config, doc=__doc__)

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments import (
    _headline,
    mnist_convnet,
    mnist_mlp,
    speech_updates,
    ssd_digits,
    ssd_scales,
)
from experiments.benchmarks import (
    _memory_by_hand,
    loss_curves,
    loss_scales,
    memory,
    scaling,
    speed,
)
from experiments.harness import precisions
from experiments.harness.errors import ConfigError, ExperimentError
from experiments.harness.numerics_plots import numerics_figure
from experiments.harness.output import RESULTS, save_figure
from experiments.tables import in_todays_names

HEADLINE = RESULTS.parents[1] / "docs" / "_static" / "headline.png"
FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    speed.NAME: speed.draw,
    loss_curves.NAME: loss_curves.draw,
    loss_scales.NAME: loss_scales.draw,
    memory.NAME: memory.draw,
    _memory_by_hand.NAME: _memory_by_hand.draw,
    mnist_convnet.PRECISIONS_NAME: precisions.draw,
    mnist_mlp.NUMERICS_NAME: lambda t: numerics_figure(t["title"], t["runs"]),
    scaling.NAME: scaling.draw,
    speech_updates.NAME: speech_updates.draw,
    ssd_digits.GRADIENTS_NAME: ssd_scales.draw_gradients,
    ssd_scales.NAME: ssd_scales.draw,
}


def main(config: Config) -> list[Path]:
    """Draws the pictures; returns their paths.

    Raises:
      ConfigError: if --only matches no picture.
      ExperimentError: if a result file is missing or damaged.
      WorkdirError: if a picture cannot be written.
    """
    pictures = {
        path: draw
        for path, draw in find_pictures().items()
        if re.search(config.only, path.name)
    }
    if not pictures:
        names = ", ".join(path.name for path in find_pictures())
        raise ConfigError(
            f"--only {config.only!r} matches no picture; there are {names}."
        )
    paths = []
    for path, draw in pictures.items():
        if config.output_dir is not None:
            path = config.output_dir / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(path, draw())
        print(f"written to {path}")
        paths.append(path)
    return paths


def find_pictures() -> dict[Path, Callable[[], Figure]]:
    """Returns every picture's path, with what draws it from the result files.

    Raises:
      ExperimentError: if a result file is damaged.
    """
    pictures = {}
    for source in sorted(RESULTS.glob("*.json")):
        result = _guard(source, lambda source=source: _read(source))
        if result["experiment"] in FIGURES:
            draw = FIGURES[result["experiment"]]
            pictures[source.with_suffix(".png")] = (
                lambda source=source, draw=draw, result=result: _guard(
                    source, lambda: draw(result)
                )
            )
    pictures[HEADLINE] = lambda: _guard(RESULTS, lambda: _headline.draw(RESULTS))
    return pictures


def _read(source: Path) -> dict[str, Any]:
    return in_todays_names(json.loads(source.read_text()))


def _guard(source: Path, fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExperimentError(
            f"cannot draw {source} ({type(error).__name__}: {error}); restore the "
            "file, or make it anew with the command that it names."
        ) from error
