"""Average precision by the rules of Pascal VOC.

Source: M. Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", 2010,
section 4.2, and the development kits of VOC2007 (11 points) and VOC2010 (area). N
denotes the number of images, D the detections of an image, M its objects.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data.detection.examples import Annotation

MIN_OVERLAP = 0.5
_RECALLS = np.linspace(0, 1, 11)  # of VOC2007
_WRONG, _RIGHT, _IGNORED = 0, 1, 2  # verdicts on a detection


class Found(NamedTuple):
    """What was found in one image, in NumPy.

    Attributes:
      boxes: corners (D, 4), in shares of the image.
      scores: (D,).
      labels: int (D,), from 1.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class AveragePrecision(NamedTuple):
    """Average precision of one class; NaN without an object that counts.

    Attributes:
      voc07: mean of the precisions at recalls of 0, 0.1, ..., 1.
      area: area under the curve of precision over recall.
    """

    voc07: float
    area: float


def average_precisions(
    found: Sequence[Found], annotations: Sequence[Annotation], num_classes: int
) -> list[AveragePrecision]:
    """Returns the average precision of each class.

    A detection is right if it overlaps an object of its class by at least 0.5, more
    than it overlaps others, and no detection of a higher score has that object. One
    that has a difficult object or a crowd counts neither as right nor as wrong.

    Args:
      found: in each image (N,).
      annotations: of the images (N,).
      num_classes: how many classes there are.
    """
    results = []
    for label in range(1, num_classes + 1):
        verdicts, num_objects = _judge(found, annotations, label)
        precision, recall = precision_and_recall(verdicts, num_objects)
        results.append(
            AveragePrecision(voc07(precision, recall), area(precision, recall))
            if num_objects
            else AveragePrecision(np.nan, np.nan)
        )
    return results


def mean_over_classes(values: Sequence[float]) -> float:
    """Returns the mean without NaN; NaN if nothing else is there."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def precision_and_recall(
    verdicts: Sequence[bool], num_objects: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns precision and recall after each detection, the best first.

    Args:
      verdicts: whether each detection is right, in descending order of scores.
      num_objects: how many objects there are to find.
    """
    num_right = np.cumsum(np.asarray(verdicts, float))
    num_detections = np.arange(1, len(verdicts) + 1)
    return num_right / num_detections, num_right / max(num_objects, 1)


def voc07(precision: np.ndarray, recall: np.ndarray) -> float:
    """Returns the mean over 11 recalls of the best precision at that recall or more.

    >>> voc07(np.array([1.0, 0.5]), np.array([0.5, 0.5]))
    0.5454545454545454
    """
    # Recalls such as 7/10 are reached in spite of rounding.
    best = [precision[recall >= r - 1e-9].max(initial=0) for r in _RECALLS]
    return float(np.mean(best))


def area(precision: np.ndarray, recall: np.ndarray) -> float:
    """Returns the area under the curve, where precision never rises with recall.

    >>> area(np.array([1.0, 0.5]), np.array([0.5, 0.5]))
    0.5
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(recall, prepend=0.0)
    return float(np.sum(steps * envelope))


def pairwise_overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns intersection over union (D, M) of boxes (D, 4) and (M, 4), in float64."""
    a, b = np.asarray(a, float)[:, None], np.asarray(b, float)[None]
    size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.prod(np.maximum(size, 0), axis=-1)
    areas = [np.prod(x[..., 2:] - x[..., :2], axis=-1) for x in (a, b)]
    union = areas[0] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _judge(
    found: Sequence[Found], annotations: Sequence[Annotation], label: int
) -> tuple[list[bool], int]:
    """Returns whether the detections of a class are right, and how many objects it has.

    Detections are in descending order of scores, without those that do not count.
    """
    scores, verdicts, num_objects = [], [], 0
    for image, annotation in zip(found, annotations, strict=True):
        is_own = annotation.labels == label
        is_ignored = (annotation.is_difficult | annotation.is_crowd)[is_own]
        num_objects += int(np.sum(~is_ignored))
        own = np.flatnonzero(image.labels == label)
        own = own[np.argsort(-image.scores[own], kind="stable")]
        shares = pairwise_overlaps(image.boxes[own], annotation.boxes[is_own])
        verdict = _judge_image(shares, is_ignored)
        scores.append(image.scores[own])
        verdicts.append(verdict)
    if not scores:
        return [], num_objects
    order = np.argsort(-np.concatenate(scores), kind="stable")
    ordered = np.concatenate(verdicts)[order]
    return (ordered[ordered != _IGNORED] == _RIGHT).tolist(), num_objects


def _judge_image(shares: np.ndarray, is_ignored: np.ndarray) -> np.ndarray:
    """Returns a verdict for each detection (D,), the best first.

    Within an image the order by score is that of the whole data set, so that an object
    is taken by the same detection.

    Args:
      shares: overlaps (D, M).
      is_ignored: bool (M,), of the objects.
    """
    verdicts = np.full(len(shares), _WRONG)
    if not shares.shape[1]:
        return verdicts
    best = shares.argmax(axis=1)
    is_taken = np.zeros(len(is_ignored), bool)
    for row, column in enumerate(best):
        if shares[row, column] < MIN_OVERLAP:
            continue
        if is_ignored[column]:
            verdicts[row] = _IGNORED
        elif not is_taken[column]:
            is_taken[column], verdicts[row] = True, _RIGHT
    return verdicts
