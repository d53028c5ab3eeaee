"""Pascal VOC 2007 and 2012 in their own layout, which the paper's SSD is trained on.

    VOCdevkit/VOC2007/Annotations/000001.xml
    VOCdevkit/VOC2007/JPEGImages/000001.jpg
    VOCdevkit/VOC2007/ImageSets/Main/trainval.txt

Training is on trainval of both years, the test on VOC2007's test, as in SSD,
arXiv:1512.02325, section 3.1. Where only 2012 is asked for, whose test has no public
annotations, training is on train and the test on val.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

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

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep",
    "sofa", "train", "tvmonitor",
)  # fmt: skip


def load_voc(
    data_dir: Path,
    *,
    years: Sequence[int],
    num_val: int,
    image_size: int,
    num_channels: int,
    skip_bad: bool = False,
) -> DetectionDataset:
    """Reads annotations; images are decoded when they are trained on.

    Args:
      data_dir: VOCdevkit, or the directory that holds it.
      years: some of 2007 and 2012.
      num_val: how many training images are held out for validation.
      image_size: side to which images are resized, whatever their shape.
      num_channels: 1 for gray, 3 for RGB.
      skip_bad: whether images and annotations that cannot be used are left out and
        counted; each image is then read once.

    Raises:
      ExampleError: for the first that cannot be used; names the file.
      DataError: if a file of the layout is missing, or a split is empty.
    """
    root = _find_root(data_dir, years)
    train_set = "trainval" if 2007 in years else "train"
    test_set, test_year = ("test", 2007) if 2007 in years else ("val", 2012)
    files = functools.partial(
        _read_files, image_size=image_size, num_channels=num_channels, skip_bad=skip_bad
    )
    train, val = hold_out(files(root, [(y, train_set) for y in years]), num_val)
    test = files(root, [(test_year, test_set)])
    name = f"Pascal VOC {' and '.join(map(str, years))}"
    return DetectionDataset(name, str(root), CLASSES, train, val, test)


def read_annotation(path: Path, image: Path) -> Annotation:
    """Reads an XML file of Annotations.

    Pixels count from 1 there, and a box holds its last row and column.

    Args:
      path: the file.
      image: the JPEG that it belongs to.

    Raises:
      ExampleError: if it is missing or damaged, has no image, a class that VOC has not,
        or a box outside the image or without area; names the file.
    """
    try:
        root = ElementTree.parse(path).getroot()
        size = (int(_text(root, "size/width")), int(_text(root, "size/height")))
        rows = [_read_object(element) for element in root.iter("object")]
    except FileNotFoundError as error:
        message = f"{path} does not exist, though an image set names it."
        raise ExampleError(message, "without annotation") from error
    except (ElementTree.ParseError, ValueError, OSError) as error:
        message = f"{path} is damaged: {error}."
        raise ExampleError(message, "with a damaged annotation") from error
    if min(size) < 1:
        message = f"{path} is damaged: the image's size is {size[0]} x {size[1]}."
        raise ExampleError(message, "with a damaged annotation")
    unknown = [name for name, _, _ in rows if name not in CLASSES]
    if unknown:
        message = f"{path}: the class {unknown[0]!r} is none of VOC's."
        raise ExampleError(message, "with an unknown class")
    boxes = check_boxes(str(path), size, [box for _, box, _ in rows])
    return make_annotation(
        check_image_file(image),
        size,
        boxes.tolist(),
        [CLASSES.index(name) + 1 for name, _, _ in rows],
        is_difficult=[is_difficult for _, _, is_difficult in rows],
    )


def _read_object(element: ElementTree.Element) -> tuple[str, list[float], bool]:
    names = ("xmin", "ymin", "xmax", "ymax")
    left, top, right, bottom = (float(_text(element, f"bndbox/{n}")) for n in names)
    is_difficult = element.findtext("difficult", "0").strip() == "1"
    box = [left - 1, top - 1, right, bottom]
    return _text(element, "name").strip(), box, is_difficult


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"<{element.tag}> has no {path}")
    return text


def _read_files(
    root: Path,
    image_sets: Sequence[tuple[int, str]],
    *,
    image_size: int,
    num_channels: int,
    skip_bad: bool,
) -> ImageFiles:
    names = [
        (root / f"VOC{year}", name)
        for year, image_set in image_sets
        for name in _read_image_set(root / f"VOC{year}", image_set)
    ]

    def read(name: tuple[Path, str]) -> Annotation:
        folder, stem = name
        image = folder / "JPEGImages" / f"{stem}.jpg"
        return read_annotation(folder / "Annotations" / f"{stem}.xml", image)

    annotations, left_out = keep_good(names, read, skip_bad=skip_bad)
    files = ImageFiles(
        annotations, left_out, image_size=image_size, num_channels=num_channels
    )
    return files.without_unreadable() if skip_bad else files


def _read_image_set(folder: Path, image_set: str) -> list[str]:
    path = folder / "ImageSets" / "Main" / f"{image_set}.txt"
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}: {error}; expected the names of images, a line each. "
            "Unpack the archives of Pascal VOC anew."
        ) from error
    return [line.split()[0] for line in lines if line.split()]


def _find_root(data_dir: Path, years: Sequence[int]) -> Path:
    directory = Path(os.path.expanduser(data_dir))
    for root in (directory, directory / "VOCdevkit"):
        if all((root / f"VOC{year}").is_dir() for year in years):
            return root
    folders = " and ".join(f"VOC{year}" for year in years)
    raise DataError(
        f"{data_dir} holds no Pascal VOC: expected {folders} in it, or in its "
        "VOCdevkit. Name the directory with --data-dir, or other years with "
        "--voc-years."
    )
