"""Digits on a canvas: several to a scene, of several sizes, with clutter and noise.

A scene is a function of the settings, its split and its index alone. The digits of the
test are MNIST's test digits; validation has the last training digits to itself.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.data.detection.examples import (
    Annotation,
    DetectionDataset,
    make_annotation,
)
from experiments.data.detection.scenes_config import Difficulty, ScenesConfig
from experiments.data.mnist import ImageDataset

CLASSES = tuple("0123456789")
_CANVAS = 64  # pixels, on which a digit of scale 1 has MNIST's size
_INK = 64  # least value of a pixel that belongs to a digit
_NUM_TRIES = 20  # places to try for a digit that would overlap others
_VAL_SHARE = 0.1  # of the training digits


class _Clutter(NamedTuple):
    """What makes scenes difficult.

    Attributes:
      max_overlap: share of a digit's box that another may cover.
      max_pieces: pieces of other digits.
      noise: standard deviation of the pixels, of 1 for white.
      min_contrast: brightness of the faintest digit.
    """

    max_overlap: float
    max_pieces: int
    noise: float
    min_contrast: float


CLUTTER: dict[Difficulty, _Clutter] = {
    "easy": _Clutter(0.0, 0, 0.0, 1.0),
    "medium": _Clutter(0.15, 4, 0.06, 0.6),
    "hard": _Clutter(0.4, 10, 0.15, 0.35),
}


class Scenes:
    """Scenes in memory; implements `Examples`.

    Attributes:
      annotations: of all scenes.
      left_out: nothing.
      reads_files: False.
    """

    reads_files = False

    def __init__(self, images: np.ndarray, annotations: Sequence[Annotation]):
        """Takes images uint8 (N, S, S, 1) and their annotations."""
        self.annotations = annotations
        self.left_out: Mapping[str, int] = {}
        self._images = images

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns images uint8 (n, S, S, 1)."""
        return self._images[indices]


def make_dataset(
    config: ScenesConfig, digits: ImageDataset, *, num_val: int, image_size: int
) -> DetectionDataset:
    """Makes all scenes of a data set.

    Args:
      config: the settings.
      digits: images 28 x 28, uint8, and their labels.
      num_val: scenes for validation.
      image_size: side of the canvas, in pixels.
    """
    num_digits = len(digits.x_train)
    first_val = num_digits - max(1, round(_VAL_SHARE * num_digits))
    parts = {
        "train": (digits.x_train[:first_val], digits.y_train[:first_val]),
        "val": (digits.x_train[first_val:], digits.y_train[first_val:]),
        "test": (digits.x_test, digits.y_test),
    }
    nums = {"train": config.num_train, "val": num_val, "test": config.num_test}
    splits = [
        _make_scenes(config, name, nums[name], *part, image_size)
        for name, part in parts.items()
    ]
    name = f"{digits.name} scenes, {config.difficulty}"
    return DetectionDataset(name, digits.source, CLASSES, *splits)


def _make_scenes(
    config: ScenesConfig,
    split: str,
    num: int,
    images: np.ndarray,
    labels: np.ndarray,
    image_size: int,
) -> Scenes:
    canvases = np.empty((num, image_size, image_size, 1), np.uint8)
    annotations = []
    for index in range(num):
        # The split as a number: its name's bytes.
        seed = (config.seed, int.from_bytes(split.encode()), index)
        scene = _Scene(config, image_size, np.random.default_rng(seed))
        canvases[index, ..., 0] = scene.draw(images, labels)
        name = f"{split}-{index:06d}"
        size = (image_size, image_size)
        annotations.append(make_annotation(name, size, scene.boxes, scene.labels))
    return Scenes(canvases, annotations)


class _Scene:
    """One scene while it is drawn."""

    def __init__(self, config: ScenesConfig, image_size: int, rng: np.random.Generator):
        self.boxes: list[list[int]] = []
        self.labels: list[int] = []
        self._config = config
        self._clutter = CLUTTER[config.difficulty]
        self._rng = rng
        self._canvas = np.zeros((image_size, image_size), np.float32)

    def draw(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns the canvas, uint8 (S, S)."""
        rng, clutter = self._rng, self._clutter
        for _ in range(rng.integers(clutter.max_pieces + 1)):
            self._add_piece(images)
        for _ in range(rng.integers(1, self._config.max_digits + 1)):
            index = rng.integers(len(images))
            self._add_digit(images[index], int(labels[index]))
        noise = clutter.noise * rng.standard_normal(self._canvas.shape)
        pixels = np.clip(self._canvas + noise, 0, 1)
        return np.round(255 * pixels).astype(np.uint8)

    def _add_digit(self, image: np.ndarray, label: int) -> None:
        digit = self._resized(image)
        rows, columns = (np.flatnonzero((digit >= _INK).any(axis)) for axis in (1, 0))
        if not len(rows):
            return
        digit = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        for _ in range(_NUM_TRIES):
            box = self._place(digit)
            if all(self._are_apart(box, other) for other in self.boxes):
                self._paste(digit, box)
                self.boxes.append(box)
                self.labels.append(label + 1)
                return

    def _add_piece(self, images: np.ndarray) -> None:
        """Pastes a piece of a third of a digit, which is no object."""
        digit = self._resized(images[self._rng.integers(len(images))])
        side = max(2, len(digit) // 3)
        row, column = self._rng.integers(len(digit) - side + 1, size=2)
        piece = digit[row : row + side, column : column + side]
        self._paste(piece, self._place(piece))

    def _resized(self, image: np.ndarray) -> np.ndarray:
        config = self._config
        scale = self._rng.uniform(config.min_scale, config.max_scale)
        side = max(4, round(scale * 28 * len(self._canvas) / _CANVAS))
        resized = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(resized)

    def _place(self, digit: np.ndarray) -> list[int]:
        """Returns a box of the digit's size somewhere on the canvas."""
        free = len(self._canvas) - np.array(digit.shape)
        top, left = (int(x) for x in self._rng.integers(free + 1))
        return [left, top, left + digit.shape[1], top + digit.shape[0]]

    def _paste(self, digit: np.ndarray, box: Sequence[int]) -> None:
        contrast = self._rng.uniform(self._clutter.min_contrast, 1)
        left, top, right, bottom = box
        part = self._canvas[top:bottom, left:right]
        np.maximum(part, contrast * digit / np.float32(255), out=part)

    def _are_apart(self, a: Sequence[int], b: Sequence[int]) -> bool:
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        smaller = min((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
        return shared <= self._clutter.max_overlap * smaller
