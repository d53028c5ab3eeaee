"""Pictures of what a network that is trained by CTC hears, and when."""

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes

from experiments.data.speech.corpus import SAMPLE_RATE_HZ, Utterances
from experiments.data.speech.features import (
    FFT_SIZE,
    STEP_SAMPLES,
    log_mel,
    mel_filters,
)
from experiments.data.speech.vocabulary import BLANK, Vocabulary
from experiments.harness import plot_style
from experiments.harness.plot_style import decorate
from experiments.models.recognizer import Recognizer

NUM_MELS = 80
NUM_SHOWN = 3  # utterances of a picture
_FRAME_S = STEP_SAMPLES / SAMPLE_RATE_HZ
_DYNAMIC_RANGE = 9.0  # of log power, below the loudest band
_TICKS_KHZ = (0.25, 0.5, 1, 2, 4)
_MIN_PROBABILITY = 0.2  # of a symbol's maximum that is drawn
_MIN_VISIBLE = 0.01  # probability below which a line would hide the axis
_CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
)


class Heard(NamedTuple):
    """An utterance, and what was heard.

    T' denotes the outputs of the network in time, V the symbols.

    Attributes:
      samples: float32 (N,), 16 kHz.
      probabilities: (T', V); 0 is the blank.
      said: its text.
      heard: what the network made of it.
    """

    samples: np.ndarray
    probabilities: np.ndarray
    said: str
    heard: str


def hear(recognizer: Recognizer, utterances: Utterances) -> list[Heard]:
    """Returns what is heard in a few utterances, the first, the last, and between.

    Raises:
      AudioError: if one cannot be read.
    """
    last = len(utterances) - 1
    heard = []
    for index in np.unique(np.linspace(0, last, NUM_SHOWN).astype(int)).tolist():
        samples = utterances.samples(index)
        log_probabilities = recognizer.log_probabilities(samples)
        text = recognizer.text(log_probabilities)
        probabilities = np.exp(log_probabilities)
        heard.append(Heard(samples, probabilities, utterances[index].text, text))
    return heard


def draw_posteriors(
    path: Path, title: str, recognizer: Recognizer, utterances: Utterances
) -> None:
    """Draws spectrograms of a few utterances, and what is heard in them and when.

    Args:
      path: the PNG to write.
      title: title of the figure.
      recognizer: hears.
      utterances: some of these are heard.

    Raises:
      AudioError: if an utterance cannot be read.
      OSError: if the file cannot be written.
    """
    heard, vocabulary = hear(recognizer, utterances), recognizer.vocabulary
    longest_s = max(len(h.samples) for h in heard) / SAMPLE_RATE_HZ
    width = min(14.0, max(plot_style.WIDTH, 3.6 * longest_s))
    families = ["DejaVu Sans", *_installed(_CHINESE_FONTS)]
    with matplotlib.rc_context({"font.family": families}):
        figure = plot_style.new_figure(0.4 + 3.0 * len(heard), title, width)
        parts = figure.subfigures(len(heard), 1, squeeze=False)[:, 0]
        for part, utterance in zip(parts, heard, strict=True):
            _draw_utterance(part, utterance, vocabulary)
        with warnings.catch_warnings():
            # Without a font for Chinese, boxes stand for its characters.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            plot_style.label_ends(*(part.axes[1] for part in parts))
            plot_style.write_png(path, figure)


def _draw_utterance(part, utterance: Heard, vocabulary: Vocabulary) -> None:
    said, heard = utterance.said, utterance.heard
    verdict = "heard as said" if said == heard else f"heard: {heard or '(nothing)'}"
    mels, posteriors = part.subplots(2, 1, sharex=True, height_ratios=(4, 3))
    text = f"{said}   ·   {verdict}"
    mels.set_title(text, fontsize=plot_style.NORMAL, loc="left", parse_math=False)
    features = log_mel(utterance.samples, num_mels=NUM_MELS)
    duration_s = len(utterance.samples) / SAMPLE_RATE_HZ
    # A frame is drawn about its middle.
    first_s = (duration_s - len(features) * _FRAME_S) / 2
    _draw_spectrogram(mels, features, first_s)
    step_s = len(features) * _FRAME_S / max(1, len(utterance.probabilities))
    times_s = first_s + (np.arange(len(utterance.probabilities)) + 0.5) * step_s
    _draw_posteriors(posteriors, times_s, utterance.probabilities, vocabulary)
    posteriors.set_xlim(0, duration_s)


def _draw_spectrogram(axes: Axes, features: np.ndarray, first_s: float) -> None:
    loudest = float(features.max(initial=-np.inf))
    axes.imshow(
        features.T,
        origin="lower",
        aspect="auto",
        extent=(first_s, first_s + len(features) * _FRAME_S, 0, NUM_MELS),
        cmap="magma",
        vmin=loudest - _DYNAMIC_RANGE,
        vmax=loudest,
        interpolation="nearest",
    )
    axes.set_facecolor("black")
    bands_khz = mel_filters(NUM_MELS).argmax(axis=0) * SAMPLE_RATE_HZ / FFT_SIZE / 1000
    places = np.interp(_TICKS_KHZ, bands_khz, np.arange(NUM_MELS) + 0.5)
    axes.set_yticks(places.tolist(), [f"{khz:g}" for khz in _TICKS_KHZ])
    axes.set_ylabel("frequency, kHz", fontsize=plot_style.SMALL)
    axes.tick_params(labelsize=plot_style.SMALL, labelbottom=False)


def _draw_posteriors(
    axes: Axes, times_s: np.ndarray, probabilities: np.ndarray, vocabulary: Vocabulary
) -> None:
    blank = probabilities[:, BLANK]
    color = plot_style.GREY
    axes.plot(times_s, blank, "--", color=color, lw=1, label="blank", zorder=1)
    for number, symbol in enumerate(vocabulary.symbols, 1):
        values = probabilities[:, number]
        if values.max(initial=0) < _MIN_PROBABILITY:
            continue
        color = plot_style.CYCLE[(number - 1) % len(plot_style.CYCLE)]
        visible = np.where(values > _MIN_VISIBLE, values, np.nan)
        axes.plot(times_s, visible, color=color, lw=1.4, zorder=2, label="_")
        axes.fill_between(times_s, values, color=color, alpha=0.25, lw=0, zorder=2)
        for place in _peaks(values):
            axes.annotate(
                "␣" if symbol == " " else symbol,
                (times_s[place], values[place]),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=plot_style.text_color(color),
                weight="bold",
                fontsize=10,
                parse_math=False,
            )
    decorate(axes, "", "time, s", "probability")
    axes.set_ylim(0, 1.22)
    axes.set_yticks([0, 0.5, 1])


def _peaks(values: np.ndarray) -> list[int]:
    """Returns where each stretch of likely outputs of a symbol is most likely."""
    places = []
    is_likely = values >= _MIN_PROBABILITY
    for likely, group in itertools.groupby(range(len(values)), is_likely.__getitem__):
        if likely:
            places.append(max(group, key=values.__getitem__))
    return places


def _installed(fonts: Sequence[str]) -> list[str]:
    names = set(font_manager.get_font_names())
    return [name for name in fonts if name in names][:1]
