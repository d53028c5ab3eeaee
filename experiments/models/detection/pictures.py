"""Pictures of a detector: what it finds beside what is there, and matched boxes."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.data.detection.boxes import overlaps, to_corners
from experiments.data.detection.examples import Annotation, DetectionDataset, Examples
from experiments.harness import plot_style
from experiments.models.detection.average_precision import Found
from experiments.models.ssd.anchors import Level, default_boxes, level_of
from experiments.models.ssd.matching import NO_OBJECT, match

NUM_SHOWN = 5
MIN_SCORE = 0.4  # of a detection that is drawn
_COLUMN, _ROW = 1.9, 2.1  # inches
_TEXT_SIZE = (0.25, 0.07)  # of a label, in shares of the image


def draw_detections(
    path: Path, title: str, dataset: DetectionDataset, found: Sequence[Found]
) -> None:
    """Draws some of the validation images, with true boxes above and found ones below.

    Args:
      path: the PNG to write.
      title: title of the figure.
      dataset: the images.
      found: in each of its validation images.

    Raises:
      ExampleError: if an image cannot be read.
      OSError: if the file cannot be written.
    """
    indices = evenly_spaced(len(found))
    images = dataset.val.read(indices)
    figure = plot_style.new_figure(
        2 * _ROW + 0.6, title, max(plot_style.WIDTH, _COLUMN * len(indices))
    )
    panels = figure.subplots(2, len(indices), squeeze=False)
    for column, (index, image) in enumerate(zip(indices, images, strict=True)):
        above, below = panels[:, column]
        show_image(above, image, "true" if column == 0 else "")
        show_truth(above, dataset.val.annotations[index], dataset.classes)
        show_image(below, image, "found" if column == 0 else "")
        show_found(below, found[index], dataset.classes)
    plot_style.write_png(path, figure)


def draw_matches(
    path: Path, title: str, examples: Examples, levels: Sequence[Level]
) -> None:
    """Draws the default boxes that stand for objects, coloured by feature map.

    Args:
      path: the PNG to write.
      title: title of the figure.
      examples: the images, some of which are drawn.
      levels: the feature maps.

    Raises:
      ExampleError: if an image cannot be read.
      OSError: if the file cannot be written.
    """
    indices = evenly_spaced(len(examples.annotations))
    images = examples.read(indices)
    figure = plot_style.new_figure(
        _ROW + 1.0, title, max(plot_style.WIDTH, _COLUMN * len(indices))
    )
    panels = figure.subplots(1, len(indices), squeeze=False)[0]
    corners = to_corners(jnp.asarray(default_boxes(levels)))
    matches_of = jax.jit(
        lambda boxes: match(overlaps(corners, boxes), jnp.ones(len(boxes), bool))
    )
    own_level = level_of(levels)
    colors = [*itertools.islice(itertools.cycle(plot_style.CYCLE), len(levels))]
    for axes, index, image in zip(panels, indices, images, strict=True):
        boxes, _ = examples.annotations[index].trained_boxes()
        matches = np.full(len(corners), NO_OBJECT)
        if len(boxes):
            matches = np.asarray(matches_of(boxes))
        is_match = matches != NO_OBJECT
        show_image(axes, image, f"{is_match.sum()} boxes")
        for box, i in zip(
            np.asarray(corners)[is_match], own_level[is_match], strict=True
        ):
            add_box(axes, box, colors[i], width=0.8)
        for box in boxes:
            add_box(axes, box, "white", width=1.6, dashes=":")
    names = [f"{level.size} x {level.size}" for level in levels]
    handles = [Rectangle((0, 0), 1, 1, fill=False, ec=color) for color in colors]
    handles.append(Rectangle((0, 0), 1, 1, fc="0.6", ec="white", ls=":"))
    plot_style.key_below(figure, handles, [*names, "objects"])
    plot_style.write_png(path, figure)


def draw_prediction(title: str, image: np.ndarray, found: Found, classes) -> Figure:
    """Returns a picture of one image and what is found in it.

    Args:
      title: title of the figure.
      image: uint8 (H, W, C).
      found: in the image.
      classes: names of the classes.
    """
    height, width = image.shape[:2]
    figure = plot_style.new_figure(5 * height / width + 0.5, title, 5)
    axes = figure.subplots()
    show_image(axes, image, "")
    show_found(axes, found, classes)
    return figure


def evenly_spaced(num: int) -> np.ndarray:
    """Returns a few indices, the first, the last, and between."""
    return np.unique(np.linspace(0, num - 1, min(NUM_SHOWN, num)).astype(int))


def show_image(axes: Axes, image: np.ndarray, title: str) -> None:
    """Shows an image uint8 (H, W, C), whose width and height become 1."""
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    axes.imshow(
        pixels,
        extent=(0, 1, 1, 0),
        aspect=image.shape[0] / image.shape[1],
        cmap="gray",
        vmin=0,
        vmax=255,
    )
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=plot_style.SMALL)


def show_truth(axes: Axes, annotation: Annotation, classes: Sequence[str]) -> None:
    """Draws the boxes of objects; those of difficult ones and of crowds dotted."""
    is_ignored = annotation.is_difficult | annotation.is_crowd
    labels = annotation.labels
    for box, label, is_dotted in zip(annotation.boxes, labels, is_ignored, strict=True):
        dashes = ":" if is_dotted else "-"
        text = str(classes[int(label) - 1])
        add_box(axes, box, plot_style.SKY, text=text, dashes=dashes)


def show_found(axes: Axes, found: Found, classes: Sequence[str]) -> None:
    """Draws the boxes that are found with a fair score.

    Where a text would cover that of a better score, it stands at its box's bottom.
    """
    is_fair = found.scores >= MIN_SCORE
    boxes, scores = found.boxes[is_fair], found.scores[is_fair]
    for i, (box, label) in enumerate(zip(boxes, found.labels[is_fair], strict=True)):
        distances = np.abs(boxes[:i, :2] - box[:2])
        is_covering = bool((distances < _TEXT_SIZE).all(axis=1).any())
        text = f"{classes[label - 1]} {scores[i]:.2f}"
        add_box(axes, box, plot_style.ORANGE, text=text, is_text_below=is_covering)


def add_box(
    axes: Axes,
    box: np.ndarray,
    color: str,
    *,
    text: str = "",
    width: float = 1.2,
    dashes: str = "-",
    is_text_below: bool = False,
) -> None:
    """Draws a box, corners in shares of the image, and a text at its top edge.

    The text stands above the box; at the image's top inside the box, and at its right
    edge to the left. With `is_text_below` it stands below the box's bottom edge; at the
    image's bottom above that.
    """
    left, top, right, bottom = (float(x) for x in box)
    size = (right - left, bottom - top)
    patch = Rectangle((left, top), *size, fill=False, ec=color, lw=width, ls=dashes)
    axes.add_patch(patch)
    if not text:
        return
    has_room_right = left < 0.8
    edge = bottom if is_text_below else top
    is_above_edge = edge > (0.92 if is_text_below else 0.08)
    axes.text(
        left if has_room_right else right,
        edge - 0.01 if is_above_edge else edge + 0.01,
        text,
        color=color,
        fontsize=plot_style.SMALL - 1,
        ha="left" if has_room_right else "right",
        va="bottom" if is_above_edge else "top",
        bbox={"fc": "black", "ec": "none", "alpha": 0.6, "pad": 0.5},
        clip_on=True,
        parse_math=False,
    )
