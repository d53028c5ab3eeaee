"""COCO's average precision, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.data.detection.examples import Annotation
from experiments.data.extra import import_extra
from experiments.models.detection.average_precision import Found

# The first numbers of its summary.
NAMES = ("ap", "ap50", "ap75")


def coco_average_precision(
    found: Sequence[Found], annotations: Sequence[Annotation], num_classes: int
) -> dict[str, float]:
    """Returns COCO's AP over overlaps from 0.5 to 0.95, at 0.5 and at 0.75.

    A difficult object counts as any other; a crowd is ignored.

    Args:
      found: in each image.
      annotations: of the images.
      num_classes: how many classes there are.

    Raises:
      DataError: if pycocotools is not installed.
    """
    coco_module = import_extra("pycocotools.coco", extra="detection")
    cocoeval = import_extra("pycocotools.cocoeval", extra="detection")
    truth, results = coco_module.COCO(), coco_module.COCO()
    dataset = {
        "images": [
            {"id": i, "width": x.width, "height": x.height}
            for i, x in enumerate(annotations, start=1)
        ],
        "categories": [{"id": i, "name": str(i)} for i in range(1, num_classes + 1)],
    }
    truth.dataset = dataset | {"annotations": _objects(annotations)}
    results.dataset = dataset | {"annotations": _detections(found, annotations)}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth.createIndex()
        results.createIndex()
        evaluation = cocoeval.COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # It says -1 where there is nothing to find.
    values = [float(x) if x >= 0 else float("nan") for x in evaluation.stats[:3]]
    return dict(zip(NAMES, values, strict=True))


def _objects(annotations: Sequence[Annotation]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for image_id, annotation in enumerate(annotations, start=1):
        boxes = _pixels(annotation.boxes, annotation)
        for index, box in enumerate(boxes):
            row = {"id": len(rows) + 1, "image_id": image_id, "bbox": box}
            row["category_id"] = int(annotation.labels[index])
            row["iscrowd"] = int(annotation.is_crowd[index])
            row["area"] = float(annotation.areas[index])
            rows.append(row)
    return rows


def _detections(
    found: Sequence[Found], annotations: Sequence[Annotation]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    pairs = zip(found, annotations, strict=True)
    for image_id, (image, annotation) in enumerate(pairs, start=1):
        for index, box in enumerate(_pixels(image.boxes, annotation)):
            row = {"id": len(rows) + 1, "image_id": image_id, "bbox": box}
            row["category_id"] = int(image.labels[index])
            row["score"] = float(image.scores[index])
            row |= {"iscrowd": 0, "area": box[2] * box[3]}
            rows.append(row)
    return rows


def _pixels(boxes: np.ndarray, annotation: Annotation) -> list[list[float]]:
    """Returns boxes as COCO has them: left, top, width and height, in pixels."""
    size = np.array([annotation.width, annotation.height] * 2, float)
    corners = np.asarray(boxes, float).reshape(-1, 4) * size
    both = [corners[:, :2], corners[:, 2:] - corners[:, :2]]
    return np.concatenate(both, axis=1).tolist()
