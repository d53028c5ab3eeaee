"""A few utterances of a corpus, to be listened to and looked at."""

import warnings
import wave
from pathlib import Path

import numpy as np

from experiments.data import cache
from experiments.data.speech.corpus import SAMPLE_RATE_HZ, Corpus, Utterance
from experiments.data.speech.features import STEP_SAMPLES, log_mel
from experiments.harness import plot_style
from experiments.harness.files import atomic_write
from experiments.harness.plot_style import decorate

NUM_MELS = 80
_FRAMES_PER_S = SAMPLE_RATE_HZ / STEP_SAMPLES


def write_examples(directory: Path, corpus: Corpus, num: int = 6) -> list[Path]:
    """Writes utterances as WAV with a picture each: waveform and log-mel spectrogram.

    They are taken in turn from the training, validation and test sets, evenly spaced
    in each.

    Args:
      directory: where to write; made if it is missing.
      corpus: what to write from.
      num: how many utterances, if there are so many.

    Returns:
      the files, a WAV and a PNG for each utterance, named by split and place.

    Raises:
      AudioError: if an utterance cannot be read.
      DataError: if the directory cannot be written.
    """
    splits = {"train": corpus.train, "val": corpus.val, "test": corpus.test}
    files = []
    for place, (name, utterances) in enumerate(splits.items()):
        share = len(range(place, num, len(splits)))
        indices = np.linspace(0, len(utterances) - 1, min(share, len(utterances)))
        for index in indices.astype(int).tolist():
            samples = utterances.samples(index)
            stem = directory / f"{name}-{index:06d}"
            with cache.translate_os_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
                _write_wav(stem.with_suffix(".wav"), samples)
                _draw(stem.with_suffix(".png"), utterances[index], samples)
            files += [stem.with_suffix(".wav"), stem.with_suffix(".png")]
    return files


def _write_wav(path: Path, samples: np.ndarray) -> None:
    loudest = np.iinfo(np.int16).max
    rounded = np.round(np.clip(samples, -1, 1) * loudest).astype("<i2")
    with atomic_write(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(rounded.tobytes())


def _draw(path: Path, utterance: Utterance, samples: np.ndarray) -> None:
    by = f", {utterance.speaker}" if utterance.speaker else ""
    title = f"{utterance.text}   ({utterance.id}{by}, {utterance.duration_s:.2f} s)"
    figure = plot_style.new_figure(4.0, title)
    waveform, mels = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    times_s = np.arange(len(samples)) / SAMPLE_RATE_HZ
    waveform.plot(times_s, samples, lw=0.5, color=plot_style.BLUE)
    decorate(waveform, "waveform", None, "amplitude")
    features = log_mel(samples, num_mels=NUM_MELS)
    length_s = len(features) / _FRAMES_PER_S
    # A frame is drawn about its middle.
    first_s = (len(samples) / SAMPLE_RATE_HZ - length_s) / 2
    image = mels.imshow(
        features.T,
        origin="lower",
        aspect="auto",
        extent=(first_s, first_s + length_s, 0, NUM_MELS),
        cmap="magma",
        interpolation="nearest",
    )
    decorate(mels, "log-mel spectrogram", "time, s", "mel band")
    mels.grid(visible=False)
    waveform.tick_params(labelbottom=False)
    waveform.set_xlim(0, len(samples) / SAMPLE_RATE_HZ)
    bar = figure.colorbar(image, ax=mels)
    bar.set_label("log power", fontsize=plot_style.SMALL)
    bar.ax.tick_params(labelsize=plot_style.SMALL)
    with warnings.catch_warnings():
        # Fonts without Chinese characters draw boxes in the title.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        plot_style.write_png(path, figure)
