"""Pascal VOC, in a tree of its layout: what is read, and what is wrong with files."""

import numpy as np
import pytest
from PIL import Image

from experiments.data.detection.examples import ExampleError
from experiments.data.detection.voc import CLASSES, load_voc
from experiments.harness.errors import DataError

OBJECT = """
  <object>
    <name>{name}</name>
    <difficult>{difficult}</difficult>
    <bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>
  </object>
"""
SETS = {
    2007: {"trainval": ("000001", "000002", "000003"), "test": ("000004",)},
    2012: {
        "train": ("2008_000001",),
        "val": ("2008_000002",),
        "trainval": ("2008_000001", "2008_000002"),
    },
}


def write_annotation(path, objects, size=(50, 40)):
    texts = [
        OBJECT.format(*box, name=name, difficult=int(difficult))
        for name, box, difficult in objects
    ]
    width, height = size
    path.write_text(
        f"<annotation><size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>{''.join(texts)}</annotation>"
    )


def write_image(path, size=(50, 40), color=(200, 100, 0)):
    Image.new("RGB", size, color).save(path, quality=95)


@pytest.fixture
def data_dir(tmp_path):
    """A directory with both years; each image has a dog, the first one more."""
    for year, sets in SETS.items():
        folder = tmp_path / "VOCdevkit" / f"VOC{year}"
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / name).mkdir(parents=True)
        for name, stems in sets.items():
            (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(
                "".join(f"{stem}\n" for stem in stems)
            )
            for stem in stems:
                objects = [("dog", (1, 1, 25, 40), False)]
                if stem == "000001":
                    objects.append(("person", (11, 5, 50, 40), True))
                write_annotation(folder / "Annotations" / f"{stem}.xml", objects)
                write_image(folder / "JPEGImages" / f"{stem}.jpg")
    return tmp_path


def load(data_dir, **changes):
    options = {
        "years": (2007, 2012),
        "num_val": 1,
        "image_size": 8,
        "num_channels": 3,
        **changes,
    }
    return load_voc(data_dir, **options)


def stems(split):
    return [x.name.rpartition("/")[2].removesuffix(".jpg") for x in split.annotations]


def test_the_papers_splits_are_read(data_dir):
    dataset = load(data_dir)
    assert (dataset.name, len(dataset.classes)) == ("Pascal VOC 2007 and 2012", 20)
    assert stems(dataset.val) == ["000001"]
    assert stems(dataset.train) == ["000002", "000003", "2008_000001", "2008_000002"]
    assert stems(dataset.test) == ["000004"]
    (annotation,) = dataset.val.annotations
    assert annotation.labels.tolist() == [
        CLASSES.index("dog") + 1,
        CLASSES.index("person") + 1,
    ]
    # Pixels count from 1, the last one included.
    np.testing.assert_allclose(
        annotation.boxes, [[0, 0, 0.5, 1], [0.2, 0.1, 1, 1]], atol=1e-6
    )
    assert annotation.is_difficult.tolist() == [False, True]
    assert not annotation.is_crowd.any()
    np.testing.assert_allclose(annotation.areas, [25 * 40, 40 * 36])


def test_images_are_read_at_the_size_of_the_network(data_dir):
    train = load(data_dir).train
    images = train.read(np.array([0, 3]))
    assert (images.shape, images.dtype) == ((2, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(images[1, 4, 4], [200, 100, 0], atol=4)
    gray = load(data_dir, num_channels=1).train.read(np.array([0]))
    assert gray.shape == (1, 8, 8, 1)


def test_one_year_alone_is_read_too(data_dir):
    devkit = data_dir / "VOCdevkit"
    dataset = load(devkit, years=(2007,))
    assert (len(dataset.train.annotations), stems(dataset.test)) == (2, ["000004"])
    with pytest.raises(DataError, match="--num-val 1 leaves none of 1 images"):
        load(devkit, years=(2012,))


def first_annotation(data_dir):
    return data_dir / "VOCdevkit" / "VOC2007" / "Annotations" / "000001.xml"


def first_image(data_dir):
    return data_dir / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000001.jpg"


DAMAGES = {
    "without image": lambda d: first_image(d).unlink(),
    "without annotation": lambda d: first_annotation(d).unlink(),
    "with a damaged annotation": lambda d: first_annotation(d).write_text("<annot"),
    "with a box outside the image": lambda d: write_annotation(
        first_annotation(d), [("dog", (1, 1, 60, 40), False)]
    ),
    "with a box without area": lambda d: write_annotation(
        first_annotation(d), [("dog", (21, 1, 20, 40), False)]
    ),
    "with an unknown class": lambda d: write_annotation(
        first_annotation(d), [("unicorn", (1, 1, 20, 40), False)]
    ),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_what_cannot_be_used_is_named_or_counted(reason, data_dir, capsys):
    DAMAGES[reason](data_dir)
    with pytest.raises(ExampleError, match=r"000001\..*--skip-bad leaves") as info:
        load(data_dir)
    assert info.value.reason == reason
    dataset = load(data_dir, skip_bad=True)
    assert dataset.train.left_out == {reason: 1}
    assert dataset.val.left_out == dataset.test.left_out == {}
    assert "000001" not in [*stems(dataset.train), *stems(dataset.val)]
    assert "skipped: " in capsys.readouterr().err


def test_a_truncated_image_is_named_where_it_is_read_or_counted(data_dir):
    path = first_image(data_dir)
    noise = np.random.default_rng(0).integers(0, 255, (400, 500, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    dataset = load(data_dir)
    with pytest.raises(ExampleError, match=r"000001\.jpg is damaged.*--skip-bad"):
        dataset.val.read(np.array([0]))
    dataset = load(data_dir, skip_bad=True)
    assert dataset.train.left_out == {"unreadable image": 1}


def test_a_box_a_pixel_beyond_the_image_is_cut_off(data_dir):
    write_annotation(first_annotation(data_dir), [("cow", (0, 1, 51, 40), False)])
    (annotation,) = load(data_dir).val.annotations
    assert annotation.boxes.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("text", ["", "<size/>", "<size><width>0</width>"])
def test_an_annotation_without_its_parts_is_named(text, data_dir):
    first_annotation(data_dir).write_text(f"<annotation>{text}</annotation>")
    with pytest.raises(ExampleError, match=r"000001\.xml is damaged"):
        load(data_dir)


def test_a_missing_part_of_the_layout_is_named(data_dir):
    image_set = data_dir / "VOCdevkit/VOC2012/ImageSets/Main/trainval.txt"
    image_set.unlink()
    with pytest.raises(DataError, match=r"VOC2012/ImageSets/Main/trainval\.txt"):
        load(data_dir)
    with pytest.raises(DataError, match="holds no Pascal VOC: expected VOC2007 and"):
        load(data_dir / "VOCdevkit" / "VOC2007")


def test_nothing_left_is_an_error(data_dir):
    for path in data_dir.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match="no image is left of 5"):
        load(data_dir, skip_bad=True)
