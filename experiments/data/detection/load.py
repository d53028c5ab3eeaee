"""The data set that the flags name."""

from experiments.data import mnist
from experiments.data.detection.coco import load_coco
from experiments.data.detection.config import DetectionConfig
from experiments.data.detection.examples import DetectionDataset
from experiments.data.detection.scenes import make_dataset
from experiments.data.detection.voc import load_voc


def load_images(config: DetectionConfig, image_size: int) -> DetectionDataset:
    """Returns a data set for detection, with images of a size.

    Raises:
      DataError: if it is unavailable or damaged, or if a split is empty.
    """
    if config.dataset == "digits":
        digits = mnist.load(config.digit_images, config.data_dir)
        return make_dataset(
            config.scenes, digits, num_val=config.num_val, image_size=image_size
        )
    assert config.data_dir is not None  # checked by the config
    options = {
        "num_val": config.num_val,
        "image_size": image_size,
        "num_channels": config.num_channels,
        "skip_bad": config.skip_bad,
    }
    if config.dataset == "voc":
        return load_voc(config.data_dir, years=config.voc_years, **options)
    return load_coco(config.data_dir, **options)
