"""The flags of an experiment on detection: which images, and what is done to them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from experiments.data.detection.scenes_config import ScenesConfig
from experiments.harness.config import BaseConfig, require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.flags import require_directory

if TYPE_CHECKING:
    from experiments.data.detection.examples import DetectionDataset

YEARS = (2007, 2012)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionConfig(BaseConfig):
    """Settings of an experiment on detection.

    Attributes:
      NUM_CHANNELS: channels of an image, by data set.
    """

    NUM_CHANNELS: ClassVar[dict[str, int]] = {"digits": 1, "voc": 3, "coco": 3}

    dataset: Literal["digits", "voc", "coco"] = "digits"
    """digits: of MNIST, placed on a canvas; voc: Pascal VOC, or coco: COCO 2017, from
    their own folders."""

    data_dir: Path | None = None
    """VOCdevkit, or COCO's folder with annotations, train2017 and val2017. For digits:
    TFDS directory to read MNIST from; by default the cache, then every source."""

    scenes: ScenesConfig = dataclasses.field(default_factory=ScenesConfig)
    """What digits are placed on a canvas, and how."""

    digit_images: Literal["mnist", "digits"] = "mnist"
    """Images to place: mnist, or digits (scikit-learn's, offline)."""

    voc_years: tuple[int, ...] = YEARS
    """Years of Pascal VOC: 2007 2012 as in the paper, or one of them."""

    num_val: int = 500
    """Images held out for validation: training images of voc and coco, further scenes
    of digits."""

    skip_bad: bool = False
    """Leave out images that cannot be read, and annotations that cannot be used, and
    count them, instead of stopping. Each image is then read once before the
    training."""

    image_size: int | None = None
    """Side of the square images that the network sees, in pixels; for digits that of
    the canvas. By default the preset's: 64, or 300."""

    photometric: bool = False
    """Vary brightness, contrast and, in colour, saturation of training images."""

    crop: bool = False
    """Enlarge a part of a training image, or reduce it to a part of a larger one, at
    random, as in the paper."""

    flip: bool = False
    """Mirror half of the training images; digits are then no longer digits."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        super().__post_init__()
        require_positive(self, "num_val")
        if self.image_size is not None:
            require_positive(self, "image_size")
        if not self.voc_years or not set(self.voc_years) <= set(YEARS):
            raise ConfigError(
                f"--voc-years must be some of {', '.join(map(str, YEARS))}, got "
                f"{' '.join(map(str, self.voc_years))!r}."
            )
        if self.dataset != "digits" and self.data_dir is None and self.reads_images():
            raise ConfigError(
                f"--dataset {self.dataset} needs --data-dir, the folder that holds it."
            )

    def check_paths(self, experiment: str) -> None:
        """Checks --data-dir too; see `BaseConfig.check_paths`."""
        super().check_paths(experiment)
        if self.data_dir is not None:
            require_directory("--data-dir", self.data_dir)

    def reads_images(self) -> bool:
        """Whether the data set that the flags name is read at all."""
        return True

    def comparable(self) -> dict[str, Any]:
        """Returns the settings that two equal runs share, as JSON values."""
        return super().comparable() | {"voc_years": list(self.voc_years)}

    @property
    def num_channels(self) -> int:
        """Channels of an image: 1 for gray, 3 for RGB."""
        return self.NUM_CHANNELS[self.dataset]

    def load_images(self, image_size: int) -> "DetectionDataset":
        """Returns the data set that the flags name, with images of a size.

        Raises:
          DataError: if it is unavailable or damaged, or if a split is empty.
        """
        from experiments.data.detection.load import load_images

        return load_images(self, image_size)

    def augmentation(self) -> Any:
        """Returns what is done to training images."""
        from experiments.data.detection.augment import Augmentation

        return Augmentation(self.photometric, self.crop, self.flip)
