"""Loss and evaluation of networks that classify images.

A batch holds `image` (B, ...), `label` int32 (B,) and `mask` bool (B,), which is False
for padding; B denotes the batch size. Logits are cast to float32 for the loss.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import mpjax
from experiments.data.on_device import Batch
from experiments.data.splits import Splits
from experiments.harness.experiment import Task


def make_task(
    model: nn.Module,
    splits: Splits,
    tx: optax.GradientTransformation,
    policy: str,
    *,
    autocast: bool,
    seed: int,
    num_epochs: int,
    has_dropout: bool = False,
    numerics_interval: int | None = None,
) -> Task:
    """Returns the task of training a classifier.

    Args:
      model: a Linen module from images (B, ...) to logits (B, num_classes).
      splits: the data.
      tx: the optimizer, without loss scaling.
      policy: the precision policy to evaluate in.
      autocast: how the policy is applied; see `mpjax.make_eval_step`.
      seed: determines the order of the training data.
      num_epochs: passes over the training data.
      has_dropout: as in `make_loss_fn`.
      numerics_interval: as in `Task`.
    """
    train = splits.train
    image = jnp.zeros((1, *train.image_shape))
    return Task(
        batches=train.shuffled(seed),
        steps_per_epoch=train.num_batches,
        num_epochs=num_epochs,
        init=lambda key: (model.init(key, image)["params"], None),
        tx=tx,
        loss_fn=make_loss_fn(model, has_dropout=has_dropout),
        evaluate=make_evaluate(model, splits, policy, autocast=autocast),
        data=f"{train.num_examples:,} training images from {splits.source}",
        facts={"dataset": splits.name, "source": splits.source},
        step_options={"loss_weight": count_examples},
        numerics_interval=numerics_interval,
    )


def count_examples(batch: Batch) -> jax.Array:
    """Returns how many examples of a batch are not padding: its `loss_weight`."""
    return jnp.sum(batch["mask"])


def make_loss_fn(model: nn.Module, *, has_dropout: bool = False) -> Callable[..., Any]:
    """Returns `loss_fn(params, batch, key) -> (loss, aux)`.

    Args:
      model: a Linen module from images (B, ...) to logits (B, num_classes).
      has_dropout: whether to call it with `train=True` and the step's key.

    Returns:
      A function that gives the mean cross entropy of the examples, and in aux their
      `accuracy` and `num_examples`.
    """

    def loss_fn(params, batch, key):
        options = {"train": True, "rngs": {"dropout": key}} if has_dropout else {}
        sums = _sums(model, params, batch, **options)
        num = jnp.maximum(sums["num_examples"], 1)
        aux = {
            "accuracy": sums["num_correct"] / num,
            "num_examples": sums["num_examples"],
        }
        return sums["loss"] / num, aux

    return loss_fn


def make_evaluate(
    model: nn.Module,
    splits: Splits,
    policy: str,
    *,
    autocast: bool = True,
) -> Callable[[mpjax.TrainState, str], dict[str, float]]:
    """Returns `(state, split) -> {"loss": ..., "accuracy": ...}`, as Python floats.

    Args:
      model: a Linen module from images (B, ...) to logits (B, num_classes).
      splits: the data; those of `split` are evaluated.
      policy: the precision policy to evaluate in.
      autocast: how the policy is applied; see `mpjax.make_eval_step`.
    """
    eval_step = make_eval_step(model, policy, autocast=autocast)

    def evaluate(state, split):
        dataset = getattr(splits, split)
        sums = jax.device_get([eval_step(state, b) for b in dataset.in_order()])
        loss = sum(float(s["loss"]) for s in sums)
        num_correct = sum(int(s["num_correct"]) for s in sums)
        return {
            "loss": loss / dataset.num_examples,
            "accuracy": num_correct / dataset.num_examples,
        }

    return evaluate


def make_eval_step(model: nn.Module, policy: str, *, autocast: bool = True) -> Any:
    """Returns a jitted `(state, batch) -> sums` over the batch's examples."""
    return mpjax.make_eval_step(
        lambda params, batch: _sums(model, params, batch),
        policy=policy,
        autocast=autocast,
    )


def _sums(model: nn.Module, params: Any, batch: Batch, **options: Any) -> Batch:
    """Returns sums over the examples of a batch, in float32 and int32."""
    out: Any = model.apply({"params": params}, batch["image"], **options)
    logits = out.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = jnp.argmax(logits, axis=-1) == batch["label"]
    return {
        "loss": jnp.sum(jnp.where(batch["mask"], losses, 0)),
        "num_correct": jnp.sum(correct & batch["mask"]),
        "num_examples": count_examples(batch),
    }
