"""The look of every plot: colours, lines that show through, axes, labels beside data.

Colours are those of Okabe and Ito, which colour-blind readers tell apart
(https://jfly.uni-koeln.de/color/), and a policy, or a loss scale, has the same one in
every plot. Curves that should agree are drawn so that all are seen where they do: each
is narrower than the one beneath it. Nothing here touches pyplot, so that a notebook
keeps its backend.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import (
    Formatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)
from scipy.optimize import isotonic_regression

from experiments.harness.files import atomic_write

DPI = 150
WIDTH = 7.5  # inches: on a page of 700 pixels, text of 8 points has 10 pixels
SMALL, NORMAL = 8, 9  # points
BLACK, GREY = "#000000", "#999999"
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
COLORS = {
    "float64": BLACK,
    "float32": GREY,
    "mixed_float16": VERMILLION,
    "mixed_bfloat16": BLUE,
    "mixed_float8": GREEN,
    "float16": ORANGE,
    "bfloat16": SKY,
    # Ways to update float16 weights, and ways to compute in half.
    "mixed_float16_unscaled": PURPLE,
    "float16_updates": ORANGE,
    "float16_stochastic": GREEN,
    "float16_master": SKY,
    # Loss scales in float16.
    "unscaled": PURPLE,
    "scale_8": ORANGE,
    "scale_128": GREEN,
    "scale_1024": SKY,
    "dynamic": VERMILLION,
    "histogram": BLACK,
    "mixed_bfloat16, checkpointed": SKY,
    "by hand": ORANGE,
    "autocast": BLUE,
    "autocast, scan": GREEN,
}
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES = ("-", "--", ":", "-.")
_GAP = 1.25  # from one label to the next, in heights of their text


def new_figure(height: float, title: str, width: float = WIDTH) -> Figure:
    """Returns a figure of so many inches, with its title at the left.

    Lines of the title that are too long are wrapped.
    """
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    lines = [textwrap.fill(line, int(13 * width)) for line in title.splitlines()]
    text = "\n".join(lines)
    figure.suptitle(text, x=0.01, ha="left", fontsize=NORMAL + 1, parse_math=False)
    return figure


def write_png(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG, atomically, with nothing in it that changes by itself.

    Raises:
      OSError: if the file cannot be written.
    """
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})


def colors(names: Iterable[str]) -> dict[str, str]:
    """Returns a colour for each name: its own, or one that no other has.

    >>> colors(["float32", "mine"])
    {'float32': '#999999', 'mine': '#0072B2'}
    """
    names = list(dict.fromkeys(names))
    taken = {COLORS[name] for name in names if name in COLORS}
    free = [color for color in CYCLE if color not in taken] or list(CYCLE)
    others = [name for name in names if name not in COLORS]
    return {
        name: COLORS.get(name) or free[others.index(name) % len(free)] for name in names
    }


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns keywords of `Axes.plot` for curves that may lie on each other.

    The first is the broadest, and lies beneath. The others come in pairs of one width,
    the second with gaps through which the first is seen; later pairs are narrower.
    """
    num_widths = 1 + len(names) // 2
    widest = min(6.0, 1.4 + 1.6 * (num_widths - 1))
    widths = np.linspace(widest, 1.4, num_widths).tolist()
    return {
        name: {
            "color": color,
            "lw": widths[(place + 1) // 2],
            "ls": (0, (2.0, 2.0)) if place and place % 2 == 0 else "-",
            "label": name,
            "zorder": 2 + place,
        }
        for place, (name, color) in enumerate(colors(names).items())
    }


def faint(style: dict[str, Any]) -> dict[str, Any]:
    """Returns the style of a curve behind the others, without a label."""
    return style | {"alpha": 0.35, "lw": 0.8, "ls": "-", "label": "_", "zorder": 1}


def dots(style: dict[str, Any]) -> dict[str, Any]:
    """Returns the style of a curve with a dot at each point."""
    return style | {"marker": "o", "ms": style["lw"] + 2}


def reference_line(axes: Axes, y: float, text: str = "") -> None:
    """Draws a dotted line across the axes, with a text beneath its right end."""
    axes.axhline(y, color=BLACK, lw=1, ls=":")
    axes.annotate(
        text,
        (1, y),
        (-2, -3),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=SMALL,
    )


def decorate(axes: Axes, title: str, xlabel: str | None, ylabel: str | None) -> None:
    """Gives axes a title, labels with their units, and the house look.

    Args:
      axes: what to decorate.
      title: at the left above it; may be empty.
      xlabel: None where the axis is that of the panel beneath, or has names.
      ylabel: None where the axis is that of the panel beside, or has names.
    """
    axes.set_title(title, fontsize=NORMAL, loc="left")
    if xlabel:
        axes.set_xlabel(xlabel, fontsize=SMALL)
    if ylabel:
        axes.set_ylabel(ylabel, fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def count_axis(axis: Axis) -> None:
    """Gives an axis of steps, epochs or other counts whole numbers as ticks."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def number_axis(
    axis: Axis, factor: float = 1, unit: str = "", *, signed: bool = False
) -> None:
    """Gives an axis as many decimals as its ticks need to differ.

    Args:
      axis: linear, or logarithmic.
      factor: what the labels are multiplied by.
      unit: what follows each number.
      signed: whether positive numbers have a plus.
    """
    axis.set_major_formatter(_Decimals(factor, unit, signed))


def percent_axis(axis: Axis) -> None:
    """Labels shares as per cent."""
    number_axis(axis, 100, " %")


def log_axis(axis: Axis) -> None:
    """Makes an axis logarithmic, with ticks such as 0.2 and 0.5, never 2 x 10^-1.

    It is called after the data are drawn.
    """
    _set_scale(axis, "log")
    low, high = axis.get_data_interval()
    is_wide = 0 < low <= high < math.inf and high > 1000 * low
    axis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(LogLocator(subs=tuple(range(1, 10))))
    axis.set_minor_formatter(NullFormatter())
    number_axis(axis)


def log2_axis(axis: Axis, max_ticks: int = 9) -> None:
    """Makes an axis logarithmic, with ticks at powers of two, after the data are drawn.

    A single value stands in the middle, a factor of two from either end.
    """
    _set_scale(axis, "log", base=2)
    low, high = axis.get_data_interval()
    if 0 < low <= high < math.inf:
        pad = 0.4 if high > low else 1.0
        is_x = axis is axis.axes.xaxis
        set_limits = axis.axes.set_xlim if is_x else axis.axes.set_ylim
        set_limits(low / 2**pad, high * 2**pad)
    axis.set_major_locator(LogLocator(base=2, numticks=max_ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(math.log2(value))))
    axis.set_minor_locator(NullLocator())


def exponent_axis(axis: Axis) -> None:
    """Labels a linear axis of exponents with the powers of two that they stand for."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 4, 8, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))


def power(exponent: float) -> str:
    """Returns a power of two as mathematical text.

    >>> power(-24.0)
    '$2^{-24}$'
    """
    return f"$2^{{{exponent:.3g}}}$"


def percent_text(share: float) -> str:
    """Returns a share as per cent, with two digits.

    >>> [percent_text(x) for x in (0.0, 1.2e-5, 0.0123, 0.54, 1.0)]
    ['0 %', '0.0012 %', '1.2 %', '54 %', '100 %']
    """
    percent = 100 * share
    if percent == 0 or percent >= 9.95:
        return f"{percent:.0f} %"
    return f"{percent:.{1 - math.floor(math.log10(percent))}f} %"


def label_ends(*panels: Axes) -> None:
    """Writes each curve's label beside its end, right of the data, after all is drawn.

    Labels keep a distance from each other, in smaller type where there are too many; a
    thin line joins each to the end of its curve. A curve without points is named too.
    """
    if not panels:
        return
    figure: Any = panels[0].figure.figure  # the whole one, of which it may be a part
    labels = {axes: _end_labels(axes) for axes in panels}
    figure.draw_without_rendering()  # lays out: how high the panels are
    for axes, texts in labels.items():
        height = axes.bbox.height / figure.dpi * 72  # in points
        size = min(SMALL, height / _GAP / max(len(texts), 1))
        gap = _GAP * size / height
        to_axes = axes.transData + axes.transAxes.inverted()
        wanted = [
            to_axes.transform(text.xy)[1] if text.arrow_patch else 0.5 for text in texts
        ]
        places = spread(wanted, gap, gap / 2, 1 - gap / 2)
        for text, place in zip(texts, places, strict=True):
            text.set(position=(text.get_position()[0], place), fontsize=size)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Returns places at least a gap apart, as near as can be to those wanted.

    Args:
      wanted: places, in any order.
      gap: the least distance.
      low: the least place.
      high: the greatest, where there is room for all.

    >>> spread([0.5, 0.5, 0.9], 0.2, 0.0, 1.0).round(2).tolist()
    [0.4, 0.6, 0.9]
    """
    heights = np.asarray(wanted, float)
    if not heights.size:
        return heights
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(heights.size)
    fitted = isotonic_regression(heights[order] - steps).x
    places = np.empty(heights.size)
    places[order] = np.clip(fitted, low, max(low, high - steps[-1])) + steps
    return places


def key_beside(axes: Axes, title: str = "") -> None:
    """Lists the labels right of the axes, where they cover no data."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            title=title or None,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            frameon=False,
            fontsize=SMALL,
            title_fontsize=SMALL,
            handlelength=2.5,
            borderaxespad=0.5,
        )


def key_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Lists labels in a row below all panels."""
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=max(len(labels), 1),
        frameon=False,
        fontsize=SMALL,
    )


def text_color(color: str) -> tuple[float, float, float]:
    """Returns a colour dark enough for text on white."""
    red, green, blue = to_rgb(color)
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    # A contrast of 4.5 to white, as the Web Content Accessibility Guidelines ask for.
    factor = min(1.0, (0.18 / max(luminance, 1e-9)) ** (1 / 2.2))
    return red * factor, green * factor, blue * factor


class _Decimals(Formatter):
    """Writes ticks with the fewest decimals that tell them apart."""

    def __init__(self, factor: float, unit: str, signed: bool):
        self._factor, self._unit, self._signed = factor, unit, signed
        self._decimals = 0

    def __call__(self, x: float, pos: int | None = None) -> str:
        value = round(x * self._factor, self._decimals) + 0.0  # no minus zero
        sign = "+" if self._signed and value > 0 else ""
        text = f"{sign}{value:,.{self._decimals}f}{self._unit}"
        return text.replace("-", "\N{MINUS SIGN}")

    def format_ticks(self, values: Any) -> list[str]:
        """Returns the labels, of equal decimals within a decade."""
        values = [float(value) for value in values]
        is_log = isinstance(self.axis, Axis) and self.axis.get_scale() != "linear"
        if is_log and max(values, default=1) > 10 * min(values, default=1):
            return [self._alone(value) for value in values]
        self._decimals = self._needed(values, min(map(abs, np.diff(values)), default=0))
        return [self(value) for value in values]

    def _alone(self, value: float) -> str:
        self._decimals = self._needed([value], abs(value))
        return self(value)

    def _needed(self, values: list[float], step: float) -> int:
        """Returns how many decimals give every value to a hundredth of a step."""
        scaled = [value * self._factor for value in values]
        exact = 1e-9 * max(map(abs, scaled), default=0)
        tolerance = max(step * abs(self._factor) / 100, exact)
        for decimals in range(12):
            if all(abs(round(x, decimals) - x) <= tolerance for x in scaled):
                return decimals
        return 12


def _set_scale(axis: Axis, scale: str, **options: Any) -> None:
    axes = axis.axes
    setter = axes.set_xscale if axis is axes.xaxis else axes.set_yscale
    setter(scale, **options)


def _end_labels(axes: Axes) -> list[Any]:
    """Adds the labels at the heights of the curves' ends; they may overlap there."""
    labels = []
    for line in axes.get_lines():
        name = str(line.get_label())
        if name.startswith("_"):
            continue
        points = np.asarray(line.get_xydata(), float)
        points = points[np.isfinite(points).all(axis=1)] if points.size else points
        end = points[-1] if len(points) else None
        color = str(line.get_color())
        if end is not None:
            low, high = sorted(axes.get_ylim())
            end = end[0], min(max(end[1], low), high)
        leader = {"arrowstyle": "-", "color": color, "lw": 0.7, "relpos": (0, 0.5)}
        leader |= {"shrinkA": 0, "shrinkB": 0}
        labels.append(
            axes.annotate(
                name,
                xy=end or (1.0, 0.5),
                xycoords="data" if end else "axes fraction",
                xytext=(1.05, 0.5),
                textcoords="axes fraction",
                va="center",
                ha="left",
                fontsize=SMALL,
                color=text_color(color),
                arrowprops=leader if end else None,
                annotation_clip=False,
                parse_math=False,
            )
        )
    return labels
