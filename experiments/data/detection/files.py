"""Annotated images in files: checks, --skip-bad, and reading at one size."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from experiments.data.detection.examples import Annotation, ExampleError
from experiments.data.skipped import report_skipped
from experiments.harness.errors import DataError

Item = TypeVar("Item")
_TOLERANCE = (
    1.0  # pixels that a box may reach beyond its image: rounding in the corpora
)
_NUM_THREADS = 8


class ImageFiles:
    """Images that are decoded when they are read; implements `Examples`.

    Attributes:
      annotations: of all images; the name of each is its file.
      left_out: how many images were left out, by reason.
      reads_files: True.
    """

    reads_files = True

    def __init__(
        self,
        annotations: Sequence[Annotation],
        left_out: Mapping[str, int],
        *,
        image_size: int,
        num_channels: int,
    ):
        """Takes the annotations; opens nothing.

        Args:
          annotations: of the images.
          left_out: how many images were left out before, by reason.
          image_size: S, to which images are resized, whatever their shape.
          num_channels: 1 for gray, 3 for RGB.
        """
        self.annotations = annotations
        self.left_out = dict(left_out)
        self._image_size = image_size
        self._num_channels = num_channels

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns images uint8 (n, S, S, C); see `Examples`."""
        files = [self.annotations[int(index)].name for index in indices]
        try:
            with ThreadPoolExecutor(_NUM_THREADS) as executor:
                return np.stack([*executor.map(self._read_file, files)])
        except ExampleError as error:
            raise _with_hint(error) from error

    def select(
        self, indices: Iterable[int], left_out: Mapping[str, int]
    ) -> "ImageFiles":
        """Returns some of the images; `left_out` are those of the new split."""
        return ImageFiles(
            [self.annotations[index] for index in indices],
            left_out,
            image_size=self._image_size,
            num_channels=self._num_channels,
        )

    def without_unreadable(self) -> "ImageFiles":
        """Decodes every image once; leaves out those that fail, and counts them.

        Raises:
          DataError: if none is left.
        """

        def check(index: int) -> int:
            self._read_file(self.annotations[index].name)
            return index

        num = len(self.annotations)
        indices, unreadable = keep_good(range(num), check, skip_bad=True)
        left_out = Counter(self.left_out) + Counter(unreadable)
        return self.select(indices, left_out)

    def _read_file(self, path: str) -> np.ndarray:
        return read_image(path, self._image_size, self._num_channels)


def read_image(path: str | Path, image_size: int, num_channels: int) -> np.ndarray:
    """Returns an image, resized without regard to its shape, uint8 (S, S, C).

    Args:
      path: JPEG, PNG, or what else Pillow reads.
      image_size: S.
      num_channels: 1 for gray, 3 for RGB.

    Raises:
      ExampleError: if there is no such file, or it is damaged.
    """
    try:
        with Image.open(os.path.expanduser(path)) as image:
            image.draft("RGB", (image_size, image_size))  # a JPEG decodes faster, small
            mode = "L" if num_channels == 1 else "RGB"
            size = (image_size, image_size)
            small = image.convert(mode).resize(size, Image.Resampling.BILINEAR)
    except FileNotFoundError as error:
        message = f"{path} does not exist, though an annotation names it."
        raise ExampleError(message, "without image") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        reason = str(error) or type(error).__name__
        message = f"{path} is damaged, or no image: {reason}."
        raise ExampleError(message, "unreadable image") from error
    return np.asarray(small, np.uint8).reshape(image_size, image_size, num_channels)


def check_image_file(path: Path) -> str:
    """Returns the path of an image as text.

    Raises:
      ExampleError: if there is no such file.
    """
    if not path.is_file():
        message = f"{path} does not exist, though an annotation names it."
        raise ExampleError(message, "without image")
    return str(path)


def check_boxes(
    file: str, size: tuple[int, int], boxes: Sequence[Sequence[float]]
) -> np.ndarray:
    """Returns boxes in pixels, clipped to the image, float32 (N, 4).

    Args:
      file: where they are from, for the error.
      size: width and height of the image, in pixels.
      boxes: corners (N, 4).

    Raises:
      ExampleError: if one reaches more than a pixel beyond the image, or has no area.
    """
    array = np.asarray(boxes, np.float64).reshape(-1, 4)
    limits = np.array([*size, *size], np.float64)
    for box in array:
        text = f"{file}: the box {box.round(2).tolist()}"
        if not (np.all(box >= -_TOLERANCE) and np.all(box <= limits + _TOLERANCE)):
            message = f"{text} reaches beyond its image of {size[0]} x {size[1]}."
            raise ExampleError(message, "with a box outside the image")
        if not (box[2] > box[0] and box[3] > box[1]):
            raise ExampleError(f"{text} has no area.", "with a box without area")
    return np.clip(array, 0, limits).astype(np.float32)


def keep_good(
    items: Iterable[Item], make: Callable[[Item], object], *, skip_bad: bool
) -> tuple[list, dict[str, int]]:
    """Returns what can be made of items, and how many cannot, by reason.

    Args:
      items: names of images.
      make: raises `ExampleError` for what cannot be used.
      skip_bad: whether such items are left out, counted and reported.

    Raises:
      ExampleError: for the first that cannot be used, unless they are skipped.
      DataError: if nothing is left.
    """
    made: list = []
    errors: list[ExampleError] = []

    def attempt(item: Item) -> object:
        try:
            return make(item)
        except ExampleError as error:
            return error

    executor = ThreadPoolExecutor(_NUM_THREADS)
    try:
        results = executor.map(attempt, items)
        for result in tqdm(results, "reading", disable=None, leave=False):
            if not isinstance(result, ExampleError):
                made.append(result)
            elif skip_bad:
                errors.append(result)
            else:
                raise _with_hint(result) from result
    finally:
        executor.shutdown(cancel_futures=True)
    report_skipped([str(error) for error in errors], "images")
    if not made:
        raise DataError(
            "no image is left" + (f" of {len(errors)}" if errors else "") + "; check "
            "the data set."
        )
    return made, dict(Counter(error.reason for error in errors))


def hold_out(examples: ImageFiles, num_held_out: int) -> tuple[ImageFiles, ImageFiles]:
    """Returns a training and a validation set.

    Args:
      examples: the images; the training set keeps the count of those left out.
      num_held_out: how many of them, evenly spaced, are for validation.

    Raises:
      DataError: if no image would be left to train on.
    """
    num = len(examples.annotations)
    if not 0 < num_held_out < num:
        raise DataError(
            f"--num-val {num_held_out} leaves none of {num} images to train on; hold "
            "fewer out."
        )
    held_out = set(np.linspace(0, num - 1, num_held_out).astype(int).tolist())
    rest = itertools.filterfalse(held_out.__contains__, range(num))
    train = examples.select(rest, examples.left_out)
    return train, examples.select(sorted(held_out), {})


def _with_hint(error: ExampleError) -> ExampleError:
    message = f"{error} --skip-bad leaves such images out."
    return ExampleError(message, error.reason)
