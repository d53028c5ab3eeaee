"""What models are trained on: random batches, and the loss, in float32 at least.

B denotes the batch size, T time, C classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import mpjax
from experiments.models.ssd.anchors import default_boxes
from experiments.models.ssd.architecture import Architecture
from experiments.models.ssd.loss import multibox_sums, normalize
from experiments.models.ssd.matching import make_batch_targets

Batch = dict[str, jax.Array]
NUM_DIFFUSION_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Objective:
    """A kind of batch and its loss.

    Attributes:
      make_batch: `(key, batch_size) -> batch`, random, examples along axis 0.
      loss: `(apply, batch, key) -> scalar`, float32 or, if the output is, float64;
        `apply` takes the model's inputs and returns its output.
    """

    make_batch: Callable[[jax.Array, int], Batch]
    loss: Callable[[Callable[..., jax.Array], Batch, jax.Array], jax.Array]


def classification(size: int, num_classes: int) -> Objective:
    """Images (B, size, size, 3), and the cross entropy of their classes."""

    def make_batch(key, batch_size):
        image_key, label_key = jax.random.split(key)
        return {
            "image": jax.random.normal(image_key, (batch_size, size, size, 3)),
            "label": jax.random.randint(label_key, (batch_size,), 0, num_classes),
        }

    def loss(apply, batch, key):
        del key
        return _cross_entropy(apply(batch["image"]), batch["label"])

    return Objective(make_batch, loss)


def next_token(length: int, vocabulary_size: int) -> Objective:
    """Tokens (B, length), and the cross entropy of the token after each."""

    def make_batch(key, batch_size):
        shape = (batch_size, length + 1)
        tokens = jax.random.randint(key, shape, 0, vocabulary_size)
        return {"tokens": tokens[:, :-1], "label": tokens[:, 1:]}

    def loss(apply, batch, key):
        del key
        return _cross_entropy(apply(batch["tokens"]), batch["label"])

    return Objective(make_batch, loss)


def denoising(size: int) -> Objective:
    """Images (B, size, size, 3), and the mean squared error of the predicted noise.

    The noise is mixed in by a cosine schedule, at a random time for each image.
    """

    def make_batch(key, batch_size):
        return {"image": jax.random.normal(key, (batch_size, size, size, 3))}

    def loss(apply, batch, key):
        image = batch["image"]
        time_key, noise_key = jax.random.split(key)
        # In dtypes of their own, so that they are the same numbers in float64 mode.
        time = jax.random.randint(
            time_key, (len(image),), 0, NUM_DIFFUSION_STEPS, jnp.int32
        )
        noise = jax.random.normal(noise_key, image.shape, jnp.float32)
        angle = 0.5 * jnp.pi * (time / NUM_DIFFUSION_STEPS)[:, None, None, None]
        noisy = jnp.cos(angle) * image + jnp.sin(angle) * noise
        predicted = _at_least_float32(apply(noisy, time))
        return jnp.mean((predicted - noise) ** 2)

    return Objective(make_batch, loss)


def transcription(
    num_frames: int, num_frequencies: int, num_labels: int, num_classes: int
) -> Objective:
    """Spectrograms (B, num_frames, num_frequencies), and the CTC loss of their labels.

    Every utterance has all its frames and `num_labels` labels; 0 is the blank.
    """
    ctc_loss = mpjax.full_precision(optax.ctc_loss)

    def make_batch(key, batch_size):
        frame_key, label_key = jax.random.split(key)
        frames = (batch_size, num_frames, num_frequencies)
        labels = (batch_size, num_labels)
        return {
            "spectrogram": jax.random.normal(frame_key, frames),
            "label": jax.random.randint(label_key, labels, 1, num_classes),
        }

    def loss(apply, batch, key):
        del key
        logits = _at_least_float32(apply(batch["spectrogram"]))
        paddings = jnp.zeros(logits.shape[:2])
        label_paddings = jnp.zeros(batch["label"].shape)
        losses = ctc_loss(logits, paddings, batch["label"], label_paddings)
        return jnp.mean(losses) / num_labels

    return Objective(make_batch, loss)


def detection(
    architecture: Architecture, num_classes: int, num_objects: int = 8
) -> Objective:
    """Images with boxes (B, num_objects, 4), and the loss of an SSD by matches."""
    size, num_channels = architecture.image_size, architecture.num_channels
    anchors = default_boxes(architecture.levels())
    match_all = make_batch_targets(anchors)

    def make_batch(key, batch_size):
        keys = jax.random.split(key, 4)
        shape = (batch_size, num_objects)
        # In dtypes of their own, so that they are the same numbers in float64 mode.
        corner = jax.random.uniform(keys[0], (*shape, 2), jnp.float32, 0, 0.7)
        sizes = jax.random.uniform(keys[1], (*shape, 2), jnp.float32, 0.1, 0.3)
        return {
            "image": jax.random.normal(
                keys[2], (batch_size, size, size, num_channels), jnp.float32
            ),
            "boxes": jnp.concatenate([corner, corner + sizes], axis=-1),
            "label": jax.random.randint(keys[3], shape, 1, num_classes + 1, jnp.int32),
        }

    def loss(apply, batch, key):
        del key
        offsets, logits = apply(batch["image"])
        mask = jnp.ones(batch["label"].shape, bool)
        targets = match_all(batch["boxes"], batch["label"], mask)
        sums = multibox_sums(offsets, logits, targets)
        return normalize(sums, sums.localization + sums.confidence, "matches")

    return Objective(make_batch, loss)


def regression(length: int, width: int) -> Objective:
    """Vectors (B, length, width), and the mean squared error to others."""

    def make_batch(key, batch_size):
        shape = (batch_size, length, width)
        keys = zip(("x", "target"), jax.random.split(key), strict=True)
        return {name: jax.random.normal(key, shape) for name, key in keys}

    def loss(apply, batch, key):
        del key
        predicted = _at_least_float32(apply(batch["x"]))
        return jnp.mean((predicted - batch["target"]) ** 2)

    return Objective(make_batch, loss)


def _cross_entropy(logits: Any, label: jax.Array) -> jax.Array:
    logits = _at_least_float32(logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return jnp.mean(losses)


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
