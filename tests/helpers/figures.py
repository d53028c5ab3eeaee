"""What every figure holds: axes that say what they show, texts that keep apart."""

import itertools

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation, Text


def check(figure):
    """Asserts what a reader needs of every panel, and that no texts overlap."""
    figure.draw_without_rendering()
    for axes in panels(figure):
        for axis in (axes.xaxis, axes.yaxis):
            labels = tick_labels(axis)
            assert len(set(labels)) == len(labels), labels
            assert has_meaning(axis), (axes.get_title(loc="left"), axis.axis_name)
    title = figure.get_suptitle()
    assert box_of(figure._suptitle).x1 < figure.bbox.x1, f"cut off: {title}"
    boxes = [(text, box_of(text)) for text in texts(figure)]
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        assert not overlap(box, other), (a.get_text(), b.get_text())
    for axes in panels(figure):
        for text in end_labels(axes):
            assert box_of(text).x0 > axes.bbox.x1, text.get_text()


def panels(figure):
    """Returns the axes that show data."""
    return [axes for axes in figure.axes if axes.get_visible() and axes.axison]


def panel(figure, title):
    """Returns the panel whose title begins so."""
    (found,) = (a for a in panels(figure) if a.get_title(loc="left").startswith(title))
    return found


def has_meaning(axis):
    """Returns whether an axis has a label, names as ticks, or is another panel's."""
    labels = tick_labels(axis)
    is_named = all(label[0].isalpha() for label in labels)
    is_shared = not labels
    is_bar = axis.axes.get_label() == "<colorbar>"
    return bool(axis.get_label_text()) or is_named or is_shared or is_bar


def tick_labels(axis):
    """Returns the labels of the ticks that are seen."""
    return [text.get_text() for text in _tick_texts(axis)]


def end_labels(axes):
    """Returns the labels at the ends of curves."""
    annotations = [text for text in axes.texts if isinstance(text, Annotation)]
    return [text for text in annotations if text.get_annotation_clip() is False]


def texts(figure):
    """Returns all texts that are seen."""
    found = []
    for axes in panels(figure):
        for axis in (axes.xaxis, axes.yaxis):
            found += [*_tick_texts(axis), axis.label]
        found += [*axes.texts, axes.title, axes._left_title]
        legend = axes.get_legend()
        found += legend.get_texts() if legend else []
    hidden = [axes for axes in figure.axes if not axes.axison]
    found += [text for axes in hidden for text in axes.texts]
    found += [text for legend in figure.legends for text in legend.get_texts()]
    found += [text for text in figure.findobj(Text) if text is figure._suptitle]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def box_of(text):
    """Returns the box of a text, without the line that joins it to a point."""
    return Text.get_window_extent(text)


def overlap(a, b, tolerance=1.0):
    """Returns whether two boxes share more than a pixel in both directions."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width > tolerance and height > tolerance


def render(figure):
    """Returns the figure's pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def num_pixels(pixels, axes, color):
    """Returns how many pixels of a panel have a colour."""
    x0, y0, x1, y1 = (int(edge) for edge in axes.bbox.extents)
    height = pixels.shape[0]
    part = pixels[height - y1 : height - y0, x0:x1].astype(int)
    wanted = np.round(255 * np.array(to_rgb(color)))
    return int((np.abs(part - wanted).max(axis=-1) <= 2).sum())


def _tick_texts(axis):
    low, high = sorted(axis.get_view_interval())
    pad = 1e-9 * max(abs(low), abs(high))
    ticks = zip(axis.get_majorticklocs(), axis.get_major_ticks(), strict=False)
    both = [
        t
        for place, tick in ticks
        if low - pad <= place <= high + pad
        for t in (tick.label1, tick.label2)
    ]
    return [t for t in both if t.get_visible() and t.get_text()]
