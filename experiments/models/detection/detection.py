"""Loss and evaluation of an SSD. Batches are those of `data.detection.batches`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax
from experiments.data.detection.batches import Batch, DetectionBatches
from experiments.data.detection.examples import DetectionDataset
from experiments.harness.experiment import Task
from experiments.models.detection.average_precision import (
    AveragePrecision,
    Found,
    average_precisions,
    mean_over_classes,
)
from experiments.models.detection.coco_ap import coco_average_precision
from experiments.models.ssd.anchors import default_boxes
from experiments.models.ssd.loss import (
    LossSums,
    Normalization,
    multibox_sums,
    normalize,
)
from experiments.models.ssd.matching import make_batch_targets
from experiments.models.ssd.network import SSD
from experiments.models.ssd.nms import Detections, detect

# Boxes of a batch stay float32 where inputs are cast to half.
NO_CAST_INPUTS = "boxes"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A data set in batches.

    Attributes:
      dataset: the images.
      train: shuffled, without end.
      val: for validation.
      test: for the test.
    """

    dataset: DetectionDataset
    train: DetectionBatches
    val: DetectionBatches
    test: DetectionBatches

    def in_words(self) -> str:
        """Returns how many images there are, and how many were left out, and why."""
        splits = {name: getattr(self, name) for name in ("train", "val", "test")}
        texts = [f"{split.num_examples:,} {n}" for n, split in splits.items()]
        left_out = self.left_out()
        reasons = [f"{count} {reason}" for reason, count in left_out.items()]
        more = f" (left out: {', '.join(reasons)})" if reasons else ""
        return f"{self.dataset.name}: {', '.join(texts)} images{more}"

    def left_out(self) -> dict[str, int]:
        """Returns how many images of all splits were left out, by reason."""
        counts: dict[str, int] = {}
        for name in ("train", "val", "test"):
            for reason, count in getattr(self.dataset, name).left_out.items():
                counts[reason] = counts.get(reason, 0) + count
        return counts


def make_task(
    model: SSD,
    data: Prepared,
    tx: optax.GradientTransformation,
    evaluate: "Evaluation",
    *,
    num_epochs: int,
    normalization: Normalization = "matches",
    loss_factor: float = 1.0,
    init: Callable[[jax.Array], tuple[Any, Any]] | None = None,
    numerics_interval: int | None = None,
) -> Task:
    """Returns the task of training a detector.

    Args:
      model: the network.
      data: the images.
      tx: the optimizer, without loss scaling.
      evaluate: an `Evaluation` of the model on the images.
      num_epochs: passes over the training images.
      normalization: what the loss is divided by.
      loss_factor: what the loss is multiplied by.
      init: as in `Task`; by default the model's own.
      numerics_interval: as in `Task`.
    """
    return Task(
        batches=data.train,
        steps_per_epoch=data.train.num_batches,
        num_epochs=num_epochs,
        init=init or make_init(model),
        tx=tx,
        loss_fn=make_loss_fn(model, normalization, loss_factor),
        evaluate=evaluate,
        data=data.in_words(),
        facts={
            "dataset": data.dataset.name,
            "source": data.dataset.source,
            "num_epochs": num_epochs,
            "batch_size": data.train.batch_size,
            "num_anchors": len(default_boxes(model.architecture.levels())),
            "left_out": data.left_out(),
        },
        step_options={"no_cast_inputs": NO_CAST_INPUTS},
        numerics_interval=numerics_interval,
    )


def make_init(model: SSD) -> Callable[..., Any]:
    """Returns `key -> (params, None)`."""
    size, num_channels = model.architecture.image_size, model.architecture.num_channels

    # It runs once: XLA would spend far longer on optimizing it than it takes.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
    def init(key):
        images = jnp.zeros((1, size, size, num_channels))
        return model.init(key, images)["params"], None

    return init


def make_loss_fn(
    model: SSD, normalization: Normalization = "matches", factor: float = 1.0
) -> Callable[..., Any]:
    """Returns `loss_fn(params, batch, key) -> (loss, aux)`.

    The loss is 0, and so are its gradients, for a batch without objects. In aux stand
    its parts, `localization_loss` and `confidence_loss`, and `num_matches`.
    """
    sums_fn = _make_sums(model)

    def loss_fn(params, batch, key):
        del key
        _, _, sums = sums_fn(params, batch)
        parts = {"localization": sums.localization, "confidence": sums.confidence}
        losses = {
            k: normalize(sums, v, normalization, factor) for k, v in parts.items()
        }
        aux = {f"{name}_loss": loss for name, loss in losses.items()}
        return sum(losses.values()), {**aux, "num_matches": sums.num_matches}

    return loss_fn


def make_eval_step(model: SSD, policy: str, *, autocast: bool = True) -> Any:
    """Returns a jitted `(state, batch) -> (detections, sums of losses)`."""
    sums_fn, anchors = _make_sums(model), _anchors(model)

    def detect_all(offsets, logits):
        return detect(offsets, logits, anchors)

    find = mpjax.full_precision(detect_all)

    def eval_fn(params, batch) -> tuple[Detections, LossSums]:
        offsets, logits, sums = sums_fn(params, batch)
        found = find(offsets.astype(jnp.float32), logits.astype(jnp.float32))
        return found, sums

    return mpjax.make_eval_step(
        eval_fn, policy=policy, autocast=autocast, no_cast_inputs=NO_CAST_INPUTS
    )


class Evaluation:
    """Evaluates a network: `evaluation(state, split) -> {metric name: number}`.

    Attributes:
      found: in the images of the split that was evaluated last, in order.
      by_class: their average precision, by class.
    """

    def __init__(
        self,
        model: SSD,
        data: Prepared,
        policy: str,
        *,
        autocast: bool,
        normalization: Normalization = "matches",
        loss_factor: float = 1.0,
        has_coco: bool = False,
    ):
        """Compiles nothing yet.

        Args:
          model: the network.
          data: the images.
          policy: the precision policy to evaluate in.
          autocast: how the policy is applied; see `mpjax.make_eval_step`.
          normalization: what the loss is divided by.
          loss_factor: what the loss is multiplied by.
          has_coco: whether to evaluate by COCO's rules, too.
        """
        self.found: list[Found] = []
        self.by_class: dict[str, AveragePrecision] = {}
        self._data = data
        self._normalization: Normalization = normalization
        self._loss_factor = loss_factor
        self._has_coco = has_coco
        self.eval_step = make_eval_step(model, policy, autocast=autocast)

    def __call__(self, state: mpjax.TrainState, split: str) -> dict[str, float]:
        """Returns `loss`, `map07` and `map_area`, and `coco_ap` where it is asked for.

        Args:
          state: whose parameters are evaluated.
          split: "val" or "test".
        """
        batches: DetectionBatches = getattr(self._data, split)
        annotations = getattr(self._data.dataset, split).annotations
        self.found, sums = [], []
        for batch, num in batches.in_order():
            detections, batch_sums = jax.device_get(self.eval_step(state, batch))
            self.found += to_found(detections)[:num]
            sums.append(batch_sums)
        classes = self._data.dataset.classes
        results = average_precisions(self.found, annotations, len(classes))
        self.by_class = dict(zip(classes, results, strict=True))
        metrics = {
            "loss": self._loss(sums, batches),
            "map07": mean_over_classes([x.voc07 for x in results]),
            "map_area": mean_over_classes([x.area for x in results]),
        }
        if self._has_coco:
            args = (self.found, annotations, len(classes))
            metrics["coco_ap"] = coco_average_precision(*args)["ap"]
        return metrics

    def _loss(self, sums: Sequence[LossSums], batches: DetectionBatches) -> float:
        """Returns the loss of a whole split; padded images add to nothing but anchors.

        An image without objects has no match, and so no negative.
        """
        total = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64)), *sums)
        per_image = total.num_anchors / (len(sums) * batches.batch_size)
        total = total._replace(num_anchors=per_image * batches.num_examples)
        both = total.localization + total.confidence
        return float(normalize(total, both, self._normalization, self._loss_factor))


def to_found(detections: Detections) -> list[Found]:
    """Returns what was found in each image of a batch, without padding."""
    columns = [np.asarray(column) for column in detections]
    boxes, scores, labels = columns
    return [
        Found(b[is_found], s[is_found], c[is_found])
        for b, s, c, is_found in zip(boxes, scores, labels, labels > 0, strict=True)
    ]


def _make_sums(model: SSD) -> Callable[..., tuple[jax.Array, jax.Array, LossSums]]:
    """Returns `(params, batch) -> (offsets, logits, sums of losses)`."""
    match_all = make_batch_targets(_anchors(model))

    def sums_fn(params, batch: Batch):
        outputs: Any = model.apply({"params": params}, batch["image"])
        targets = match_all(batch["boxes"], batch["labels"], batch["mask"])
        offsets, logits = outputs
        return offsets, logits, multibox_sums(offsets, logits, targets)

    return sums_fn


def _anchors(model: SSD) -> jax.Array:
    return jnp.asarray(default_boxes(model.architecture.levels()))
