"""Draws autocast's passes as an SVG, from the list that autocast runs."""

import html
import inspect
from collections.abc import Callable
from typing import Any

from mpjax._autocast.pipeline import PASSES

WIDTH, BOX, GAP = 720, 46, 18
FONT = "font-family='ui-sans-serif, system-ui, sans-serif'"


def draw() -> str:
    """Returns the diagram: the jaxpr in, each pass with what it does, the jaxpr out."""
    steps = [("your function's jaxpr", "traced once, in float32, with its gradient")]
    steps += [(run.__name__, summary(run)) for run in PASSES]
    steps += [("the rewritten jaxpr", "same arguments, same outputs, same dtypes")]
    height = len(steps) * (BOX + GAP) - GAP + 8
    shapes = []
    for index, (name, text) in enumerate(steps):
        y = 4 + index * (BOX + GAP)
        is_pass = 0 < index < len(steps) - 1
        fill = "#e8f1fb" if is_pass else "#f4f0e6"
        shapes.append(
            f"<rect x='4' y='{y}' width='{WIDTH - 8}' height='{BOX}' rx='7' "
            f"fill='{fill}' stroke='#8aa4c0'/>"
            f"<text x='18' y='{y + 19}' {FONT} font-size='14' font-weight='600' "
            f"fill='#16324f'>{html.escape(name)}</text>"
            f"<text x='18' y='{y + 37}' {FONT} font-size='12.5' "
            f"fill='#333'>{html.escape(text)}</text>"
        )
        if index:
            shapes.append(
                f"<path d='M {WIDTH / 2} {y - GAP} v {GAP - 5}' stroke='#5b7ea3'/>"
                f"<path d='M {WIDTH / 2 - 5} {y - 7} l 5 6 l 5 -6 z' fill='#5b7ea3'/>"
            )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' "
        f"width='{WIDTH}' height='{height}' role='img'>"
        "<title>The passes of autocast, in their order</title>"
        f"<rect width='{WIDTH}' height='{height}' fill='white'/>"
        f"{''.join(shapes)}</svg>\n"
    )


def summary(run: Callable[..., Any]) -> str:
    """Returns the first sentence of a pass's docstring."""
    return (inspect.getdoc(run) or "").split("\n\n")[0].replace("\n", " ")
