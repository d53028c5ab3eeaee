"""COCO, in a tree of its layout: what is read, and what is wrong with files."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.data.detection.coco import load_coco
from experiments.data.detection.examples import ExampleError
from experiments.harness.errors import DataError

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]
SPLITS = {"train2017": (1, 2, 3), "val2017": (4,)}


def thing(number, image_id, box, *, category=18, crowd=0, area=6.0):
    return {
        "id": number, "image_id": image_id, "bbox": box, "category_id": category,
        "iscrowd": crowd, "area": area,
    }  # fmt: skip


def annotation_file(data_dir, split="train2017"):
    return data_dir / "annotations" / f"instances_{split}.json"


def edit(data_dir, change, split="train2017"):
    file = annotation_file(data_dir, split)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.fixture
def data_dir(tmp_path):
    """Each image has a dog; the last training image a crowd, the second nothing."""
    (tmp_path / "annotations").mkdir()
    for split, numbers in SPLITS.items():
        (tmp_path / split).mkdir()
        images, objects = [], []
        for number in numbers:
            name = f"{number:012d}.jpg"
            Image.new("RGB", (40, 20)).save(tmp_path / split / name)
            images.append({"id": number, "file_name": name, "width": 40, "height": 20})
            if number != 2:
                objects.append(thing(10 * number, number, [10, 5, 20, 10]))
        if split == "train2017":
            objects.append(thing(99, 3, [0, 0, 40, 20], category=1, crowd=1))
        content = {"images": images, "annotations": objects, "categories": CATEGORIES}
        annotation_file(tmp_path, split).write_text(json.dumps(content))
    return tmp_path


def load(data_dir, **changes):
    options = {"num_val": 1, "image_size": 8, "num_channels": 3, **changes}
    return load_coco(data_dir, **options)


def test_objects_and_crowds_are_read(data_dir):
    dataset = load(data_dir)
    assert dataset.classes == ("person", "dog")
    counts = [len(x.annotations) for x in (dataset.train, dataset.val, dataset.test)]
    assert counts == [2, 1, 1]
    empty, crowded = dataset.train.annotations
    assert empty.boxes.shape == (0, 4)
    assert crowded.labels.tolist() == [2, 1]
    np.testing.assert_allclose(crowded.boxes[0], [0.25, 0.25, 0.75, 0.75])
    assert crowded.is_crowd.tolist() == [False, True]
    assert crowded.areas.tolist() == [6, 6]
    boxes, labels = crowded.trained_boxes()
    assert (boxes.shape, labels.tolist()) == ((1, 4), [2])
    assert dataset.test.read(np.array([0])).shape == (1, 8, 8, 3)


def put_object(box, **options):
    def change(content):
        content["annotations"].append(thing(7, 1, box, **options))

    return lambda data_dir: edit(data_dir, change)


DAMAGES = {
    "without image": lambda d: (d / "train2017" / "000000000001.jpg").unlink(),
    "with a box outside the image": put_object([30, 5, 20, 10]),
    "with a box without area": put_object([30, 5, 0, 10]),
    "with an unknown class": put_object([1, 1, 5, 5], category=7),
    "with a damaged annotation": put_object([1, 1, 5]),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_what_cannot_be_used_is_named_or_counted(reason, data_dir):
    DAMAGES[reason](data_dir)
    with pytest.raises(ExampleError, match=r"0001\.jpg|json, image 1") as info:
        load(data_dir)
    assert info.value.reason == reason
    dataset = load(data_dir, skip_bad=True)
    assert dataset.train.left_out == {reason: 1}
    assert len(dataset.train.annotations) == 1


def test_objects_of_no_image_are_named(data_dir):
    edit(data_dir, lambda c: c["annotations"].append(thing(8, 77, [1, 1, 2, 2])))
    with pytest.raises(ExampleError, match="json, image 77: objects are annotated"):
        load(data_dir)
    assert load(data_dir, skip_bad=True).train.left_out == {"without image": 1}


def test_a_truncated_image_is_counted(data_dir):
    path = data_dir / "train2017" / "000000000001.jpg"
    path.write_bytes(path.read_bytes()[:200])
    assert load(data_dir, skip_bad=True).train.left_out == {"unreadable image": 1}


def test_a_damaged_file_is_named(data_dir):
    file = annotation_file(data_dir, "val2017")
    text = file.read_text()
    for content in (text[:50], "[]", json.dumps({"images": []})):
        file.write_text(content)
        with pytest.raises(DataError, match=r"instances_val2017\.json is damaged"):
            load(data_dir)
    for key in ("images", "annotations", "categories"):
        file.write_text(json.dumps(json.loads(text) | {key: [{}]}))
        with pytest.raises(DataError, match=r"instances_val2017\.json is damaged"):
            load(data_dir)
    file.unlink()
    with pytest.raises(DataError, match=r"cannot read .*instances_val2017\.json"):
        load(data_dir)


def test_splits_with_other_classes_are_refused(data_dir):
    edit(data_dir, lambda c: c["categories"].pop(), "val2017")
    with pytest.raises(DataError, match="train2017 and val2017 have other classes"):
        load(data_dir)
