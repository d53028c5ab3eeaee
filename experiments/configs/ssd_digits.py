"""The flags of the single-shot detector."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from experiments.data.detection.config import DetectionConfig
from experiments.harness.config import require, require_positive
from experiments.harness.errors import ConfigError
from experiments.harness.flags import require_file

if TYPE_CHECKING:
    from experiments.models.ssd.architecture import Architecture

# The settings that the weights of a network belong to.
NETWORK = ("preset", "dataset", "image_size", "depth", "autocast")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DetectionConfig):
    """Settings of the experiment."""

    EXTENSIBLE: ClassVar[tuple[str, ...]] = ("num_epochs",)

    policies: str = "float32,mixed_float16,mixed_bfloat16"
    """Precision policies to train in, separated by commas; the same seed in each."""

    preset: Literal["tiny", "small", "ssd300"] = "small"
    """Size of the network: small, for a CPU; tiny, to try something out in seconds; or
    ssd300, the paper's, with VGG-16 as its trunk and images of 300 pixels, for a
    GPU."""

    depth: int = 0
    """Further 3 x 3 convolutions at the end of each stage of the trunk."""

    num_epochs: int = 5
    """Passes over the training set. With --resume there can be more than before: the
    run goes on past its old end."""

    batch_size: int = 32
    """Images per step; what is left of an epoch after the last whole batch is not
    trained on."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """adam, or sgd: with Nesterov's momentum and --weight-decay, like the paper's."""

    learning_rate: float = 2e-3
    """Largest learning rate; it rises for a tenth of the steps, then falls to 0."""

    momentum: float = 0.9
    """Momentum of sgd."""

    weight_decay: float = 5e-4
    """Weight decay of sgd."""

    max_grad_norm: float = 10.0
    """Gradients of a larger norm are scaled down to it."""

    normalization: Literal["matches", "anchors"] = "matches"
    """What the loss is divided by: the default boxes that match an object, as in the
    paper; or anchors, all default boxes of the batch, which makes gradients smaller by
    orders of magnitude."""

    loss_factor: float = 1.0
    """The loss is multiplied by it, as where it is one of several tasks' losses. Adam's
    steps do not depend on it, the range that gradients need does."""

    init_weights: Path | None = None
    """Safetensors file with weights of the trunk to start from, such as the
    trunk.safetensors that each policy of another run leaves. Names are conv1_1.kernel,
    conv1_1.bias, ..., kernels (height, width, inputs, outputs)."""

    numerics: bool = False
    """Count the exponents of activations and of their gradients, and draw them in
    numerics.png by layer, in gradients.png all together, as in the paper's figure 3."""

    numerics_interval: int = 50
    """With --numerics: steps from one count to the next."""

    predict: tuple[Path, ...] = ()
    """Draw what the network trained in --workdir finds in these images, and train
    nothing. --policy chooses."""

    def __post_init__(self):
        """Checks the settings.

        Raises:
          ConfigError: for the first that cannot work.
        """
        super().__post_init__()
        require_positive(self, "num_epochs", "batch_size", "learning_rate")
        require_positive(self, "max_grad_norm", "numerics_interval", "loss_factor")
        require(self.depth >= 0, "--depth", "0 or more", self)
        require(self.weight_decay >= 0, "--weight-decay", "0 or more", self)
        require(0 <= self.momentum < 1, "--momentum", "from 0 to less than 1", self)
        if self.predict:
            self._check_predict()
        self.architecture()

    def check_paths(self, experiment: str) -> None:
        """Checks --predict and --init-weights too; see `BaseConfig.check_paths`."""
        if self.predict:
            from experiments.harness.workdir import check_is_run

            assert self.workdir is not None  # checked with the flags
            check_is_run(self.workdir)
            for image in self.predict:
                require_file("--predict", image)
            return
        super().check_paths(experiment)
        if self.init_weights is not None:
            require_file("--init-weights", self.init_weights)

    def reads_images(self) -> bool:
        """Whether the data set is read: not to predict."""
        return not self.predict

    def comparable(self) -> dict[str, Any]:
        """Returns the settings to compare, without what changes no number."""
        values = super().comparable()
        return {k: v for k, v in values.items() if k != "predict"}

    def architecture(self) -> "Architecture":
        """Returns the layers of the network.

        Raises:
          ConfigError: if the images are too small for them.
        """
        from experiments.models.ssd.architecture import PRESETS

        preset = PRESETS[self.preset]
        image_size = self.image_size or preset.image_size
        architecture = dataclasses.replace(
            preset.deepened(self.depth),
            image_size=image_size,
            num_channels=self.num_channels,
        )
        try:
            architecture.map_sizes()
        except ValueError as error:
            raise ConfigError(f"--image-size {image_size}: {error}") from error
        return architecture

    def _check_predict(self) -> None:
        if self.workdir is None:
            raise ConfigError("--predict needs --workdir, a run that has trained.")
        for name in ("resume", "init_weights", "numerics"):
            if getattr(self, name):
                raise ConfigError(
                    f"--predict trains nothing; leave --{name.replace('_', '-')} out."
                )
