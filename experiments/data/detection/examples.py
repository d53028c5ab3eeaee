"""What the detection experiment asks of a data set: images, and objects with boxes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from experiments.harness.errors import DataError


class ExampleError(DataError):
    """One image, or its annotation, that cannot be used.

    Attributes:
      reason: what is wrong, in a few words, to count such images by.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class Annotation(NamedTuple):
    """The objects of an image.

    N denotes the number of objects. Boxes are corners (left, top, right, bottom) in
    shares of the image's width and height.

    Attributes:
      name: the image's file, or its name in a data set without files.
      width: of the image, in pixels.
      height: of the image, in pixels.
      boxes: float32 (N, 4).
      labels: classes int32 (N,), from 1.
      is_difficult: bool (N,); evaluation by VOC's rules ignores these objects.
      is_crowd: bool (N,); boxes of many objects, which evaluation ignores and training
        does not see.
      areas: float32 (N,), in pixels, of the objects themselves where that is known.
    """

    name: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    is_difficult: np.ndarray
    is_crowd: np.ndarray
    areas: np.ndarray

    def trained_boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns boxes (n, 4) and labels (n,) of the objects that training sees."""
        return self.boxes[~self.is_crowd], self.labels[~self.is_crowd]


class Examples(Protocol):
    """A split of a data set: a sequence of annotated images of one size.

    Attributes:
      annotations: of all images, in order.
      left_out: how many images were left out, by reason.
      reads_files: whether reading takes long enough to be done ahead of the training.
    """

    @property
    def annotations(self) -> Sequence[Annotation]: ...

    @property
    def left_out(self) -> Mapping[str, int]: ...

    @property
    def reads_files(self) -> bool: ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns images uint8 (n, S, S, C), gray (C = 1) or RGB.

        Raises:
          ExampleError: if one cannot be read; names the file and the reason.
        """
        ...


class DetectionDataset(NamedTuple):
    """A data set for detection.

    Attributes:
      name: its name in results.
      source: where the images came from.
      classes: names of the classes; the label of the first is 1.
      train: what to train on.
      val: what is evaluated after every epoch.
      test: what is evaluated at the end.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train: Examples
    val: Examples
    test: Examples


def make_annotation(
    name: str,
    size: tuple[int, int],
    pixel_boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    *,
    is_difficult: Sequence[bool] | None = None,
    is_crowd: Sequence[bool] | None = None,
    areas: Sequence[float] | None = None,
) -> Annotation:
    """Returns an annotation of boxes in pixels, without flags and areas if not given.

    Args:
      name: as in `Annotation`.
      size: width and height of the image, in pixels.
      pixel_boxes: (N, 4), corners from (0, 0) to `size`.
      labels: (N,).
      is_difficult: (N,).
      is_crowd: (N,).
      areas: (N,), in pixels; by default those of the boxes.
    """
    boxes = np.asarray(pixel_boxes, np.float32).reshape(-1, 4)
    shares = boxes / np.array([*size, *size], np.float32)
    none = np.zeros(len(boxes), bool)
    as_flags = lambda flags: none if flags is None else np.asarray(flags, bool)
    if areas is None:
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).tolist()
    return Annotation(
        name,
        *size,
        shares,
        np.asarray(labels, np.int32).reshape(-1),
        as_flags(is_difficult).reshape(-1),
        as_flags(is_crowd).reshape(-1),
        np.asarray(areas, np.float32).reshape(-1),
    )
