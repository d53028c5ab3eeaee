"""COCO 2017 in its own layout.

    annotations/instances_train2017.json
    annotations/instances_val2017.json
    train2017/000000000009.jpg
    val2017/000000000139.jpg

Training is on train2017, the test on val2017, whose annotations are public.
"""

import collections
import json
import os
from pathlib import Path
from typing import Any

from experiments.data.detection.examples import (
    Annotation,
    DetectionDataset,
    ExampleError,
    make_annotation,
)
from experiments.data.detection.files import (
    ImageFiles,
    check_boxes,
    check_image_file,
    hold_out,
    keep_good,
)
from experiments.harness.errors import DataError

TRAIN, TEST = "train2017", "val2017"


def load_coco(
    data_dir: Path,
    *,
    num_val: int,
    image_size: int,
    num_channels: int,
    skip_bad: bool = False,
) -> DetectionDataset:
    """Reads annotations; images are decoded when they are trained on.

    Args:
      data_dir: the directory that holds annotations, train2017 and val2017.
      num_val: how many training images are held out for validation.
      image_size: side to which images are resized, whatever their shape.
      num_channels: 1 for gray, 3 for RGB.
      skip_bad: whether images and annotations that cannot be used are left out and
        counted; each image is then read once.

    Raises:
      ExampleError: for the first that cannot be used; names the file.
      DataError: if a file of the layout is missing or damaged, a split is empty, or the
        splits have other classes.
    """
    root = Path(os.path.expanduser(data_dir))
    options = {"image_size": image_size, "num_channels": num_channels}
    splits, classes = [], []
    for split in (TRAIN, TEST):
        path = root / "annotations" / f"instances_{split}.json"
        content = _read(path)
        classes.append(_class_names(path, content))
        annotations, left_out = _annotate(path, root / split, content, skip_bad)
        files = ImageFiles(annotations, left_out, **options)
        splits.append(files.without_unreadable() if skip_bad else files)
    if classes[0] != classes[1]:
        raise DataError(f"the annotations of {TRAIN} and {TEST} have other classes.")
    train, val = hold_out(splits[0], num_val)
    return DetectionDataset("COCO 2017", str(root), classes[0], train, val, splits[1])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; expected COCO's "
            "annotations, train2017 and val2017 in --data-dir."
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Unpack it anew.") from error
    names = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(name in content for name in names):
        raise DataError(f"{path} is damaged: expected {', '.join(names)} in it.")
    return content


def _categories(path: Path, content: dict[str, Any]) -> dict[int, str]:
    """Returns the names of classes by COCO's number, in the order of the numbers."""
    try:
        names = {int(x["id"]): str(x["name"]) for x in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: categories: {error!r}.") from error
    return dict(sorted(names.items()))


def _class_names(path: Path, content: dict[str, Any]) -> tuple[str, ...]:
    return tuple(_categories(path, content).values())


def _annotate(
    path: Path, folder: Path, content: dict[str, Any], skip_bad: bool
) -> tuple[list[Annotation], dict[str, int]]:
    """Returns the annotations of all images, and how many are left out, by reason."""
    labels = {n: i for i, n in enumerate(_categories(path, content), start=1)}
    objects: dict[Any, list[dict[str, Any]]] = collections.defaultdict(list)
    images: dict[Any, dict[str, Any]] = {}
    try:
        images = {image["id"]: image for image in content["images"]}
        for found in content["annotations"]:
            objects[found["image_id"]].append(found)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error!r}. Unpack it anew.") from error

    def make(image_id: Any) -> Annotation:
        where = f"{path}, image {image_id}"
        if image_id not in images:
            message = f"{where}: objects are annotated, and there is no such image."
            raise ExampleError(message, "without image")
        return _make(where, folder, images[image_id], objects[image_id], labels)

    return keep_good([*{**images, **objects}], make, skip_bad=skip_bad)


def _make(
    where: str,
    folder: Path,
    image: dict[str, Any],
    objects: list[dict[str, Any]],
    labels: dict[int, int],
) -> Annotation:
    try:
        size = int(image["width"]), int(image["height"])
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (o["bbox"] for o in objects)]
        numbers = [int(o["category_id"]) for o in objects]
        is_crowd = [bool(o.get("iscrowd", 0)) for o in objects]
        areas = [float(o["area"]) for o in objects]
        file = folder / image["file_name"]
    except (KeyError, TypeError, ValueError) as error:
        message = f"{where} is damaged: {error!r}."
        raise ExampleError(message, "with a damaged annotation") from error
    unknown = [number for number in numbers if number not in labels]
    if unknown:
        message = f"{where}: the class {unknown[0]} is in no category."
        raise ExampleError(message, "with an unknown class")
    return make_annotation(
        check_image_file(file),
        size,
        check_boxes(f"{where} ({file})", size, boxes).tolist(),
        [labels[number] for number in numbers],
        is_crowd=is_crowd,
        areas=areas,
    )
