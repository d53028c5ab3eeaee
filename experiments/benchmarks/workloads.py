"""The models that are measured: one of each kind, of the size that people train."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.models import small
from experiments.models.attention import cudnn_attention, kernel_in_half
from experiments.models.deep_convnet import DeepConvNet
from experiments.models.mlp import MLP
from experiments.models.optimizers import rmsprop
from experiments.models.speech.loss import mean_ctc_loss
from experiments.models.speech.model import SpeechModel

NUM_CLASSES = 10
# Small enough that the loss of random labels falls from the first step on.
LEARNING_RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and everything that its training step needs.

    Attributes:
      title: what it is, for headings.
      init_params: `key -> params`, float32.
      make_batch: `(key, batch_size) -> batch`, examples along axis 0.
      loss_fn: `(params, batch, key) -> (loss, None)`, written in float32; with a model
        state `(params, model_state, batch, key) -> (loss, (model_state, None))`.
      tx: the optimizer, without loss scaling.
      batch_sizes: examples per step by platform, "cpu" and "gpu".
      init_model_state: `key -> model_state`; None for a model without one.
      by_hand: `dtype -> loss_fn` that computes in the dtype by its own casts; None
        where it is not written.
      attention: what computes its attention in half, "xla" for XLA's operations or
        "cudnn" for cuDNN's kernel, which takes no float32; None where there is no
        choice.
      with_cudnn: returns the same model, whose attention is cuDNN's in half and the
        plain one in float32; None where there is no choice.
    """

    title: str
    init_params: Callable[[jax.Array], Any]
    make_batch: Callable[[jax.Array, int], Any]
    loss_fn: Callable[..., tuple[jax.Array, Any]]
    tx: optax.GradientTransformation
    batch_sizes: dict[str, int]
    init_model_state: Callable[[jax.Array], Any] | None = None
    by_hand: Callable[[Any], Callable[..., tuple[jax.Array, Any]]] | None = None
    attention: str | None = None
    with_cudnn: Callable[[], "Workload"] | None = None


def mlp(num_units: int = 4096) -> Workload:
    """Returns the Keras guide's network: 784 inputs, two hidden layers, 10 classes."""
    model = MLP(num_units=(num_units, num_units))
    return Workload(
        title=f"MLP 784-{num_units}-{num_units}-10, RMSprop",
        init_params=lambda key: model.init(key, jnp.zeros((1, 784)))["params"],
        make_batch=_images,
        loss_fn=_classification_loss(model),
        tx=rmsprop(LEARNING_RATE),
        batch_sizes={"cpu": 2048, "gpu": 8192},
    )


def convnet() -> Workload:
    """Returns DeepConvNet on 28 x 28 pixels, without its dropout."""
    model = DeepConvNet(dropout_rate=0.0)
    return Workload(
        title="DeepConvNet, Adam",
        init_params=lambda key: model.init(key, jnp.zeros((1, 28, 28)))["params"],
        make_batch=_square_images,
        loss_fn=_classification_loss(model),
        tx=optax.adam(LEARNING_RATE),
        batch_sizes={"cpu": 128, "gpu": 4096},
    )


def transformer_block(width: int = 1024, length: int = 1024) -> Workload:
    """Returns causal self-attention (heads of 64) and a gelu MLP on (B, T, D)."""
    return _with_attention(
        f"transformer block, {width} wide, {length} long, Adam",
        functools.partial(
            small.transformer_block, width=width, length=length, num_heads=width // 64
        ),
        batch_sizes={"cpu": 2, "gpu": 16},
    )


def transformer(width: int = 512, length: int = 512, num_layers: int = 6) -> Workload:
    """Returns transformer blocks one after the other, in a `scan` over layers."""
    return _with_attention(
        f"transformer, {num_layers} layers, {width} wide, {length} long, Adam",
        functools.partial(
            small.transformer,
            width=width,
            length=length,
            num_heads=width // 64,
            num_layers=num_layers,
        ),
        batch_sizes={"cpu": 2, "gpu": 16},
    )


def bigru(width: int = 256, length: int = 200) -> Workload:
    """Returns a bidirectional GRU over (B, T, D) vectors."""
    return _from_case(
        f"bidirectional GRU, {width} wide, {length} steps, Adam",
        lambda: small.bigru(width=width, length=length),
        batch_sizes={"cpu": 32, "gpu": 256},
    )


def speech(num_seconds: float = 4.0, **fields: Any) -> Workload:
    """Returns the recognizer of `speech_ctc` with its CTC loss, on log-mel features.

    Utterances have 60 to 100 % of the length, and 8 letters a second. BatchNorm takes
    the statistics of the batch, and keeps none.

    Args:
      num_seconds: length of the longest utterance, of 100 frames a second.
      **fields: of `SpeechModel`.
    """
    model = SpeechModel(num_classes=27, **fields)
    num_frames, num_labels = round(100 * num_seconds), round(8 * num_seconds)

    def init_params(key):
        features = jnp.zeros((1, num_frames, 40))
        lengths = jnp.full((1,), num_frames)
        return model.init(key, features, lengths, train=True)["params"]

    def make_batch(key, batch_size):
        keys = jax.random.split(key, 3)
        lengths = jax.random.randint(
            keys[0], (batch_size,), num_frames * 6 // 10, num_frames + 1
        )
        labels = jax.random.randint(keys[1], (batch_size, num_labels), 1, 27)
        return {
            "features": jax.random.normal(keys[2], (batch_size, num_frames, 40)),
            "num_frames": lengths,
            "labels": labels,
            "num_labels": num_labels * lengths // num_frames,
        }

    def loss_fn(params, batch, key):
        (logits, num_outputs), _ = model.apply(
            {"params": params},
            batch["features"],
            batch["num_frames"],
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        loss, _ = mean_ctc_loss(
            logits, num_outputs, batch["labels"], batch["num_labels"]
        )
        return loss, None

    return Workload(
        title=f"speech recognizer, {model.num_layers} {model.encoder} layers, "
        f"{model.num_units} wide, {num_seconds:g} s, Adam",
        init_params=init_params,
        make_batch=make_batch,
        loss_fn=loss_fn,
        tx=optax.adam(LEARNING_RATE),
        batch_sizes={"cpu": 32, "gpu": 256},
    )


def speech_large() -> Workload:
    """Returns `speech` with 50 million parameters, on utterances of up to 15 s."""
    workload = speech(15.0, num_channels=32, num_units=896, num_layers=4)
    return dataclasses.replace(workload, batch_sizes={"cpu": 2, "gpu": 64})


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp": mlp,
    "convnet": convnet,
    "transformer_block": transformer_block,
    "transformer": transformer,
    "bigru": bigru,
    "speech": speech,
    "speech_large": speech_large,
}


def _images(key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
    image_key, label_key = jax.random.split(key)
    return {
        "image": jax.random.uniform(image_key, (batch_size, 784)),
        "label": jax.random.randint(label_key, (batch_size,), 0, NUM_CLASSES),
    }


def _square_images(key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
    batch = _images(key, batch_size)
    return {**batch, "image": batch["image"].reshape(batch_size, 28, 28)}


def _classification_loss(model: Any):
    def loss_fn(params, batch, key):
        del key
        logits = model.apply({"params": params}, batch["image"]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), None

    return loss_fn


def _random_like(key: jax.Array, x: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """Returns values of the kind of `x`: integers in its range, or normal floats."""
    if np.issubdtype(x.dtype, np.integer):
        return jax.random.randint(key, shape, 0, int(x.max()) + 1)
    return jax.random.normal(key, shape)


def _from_case(
    title: str, make_case: Callable[[], small.Case], batch_sizes: dict[str, int]
) -> Workload:
    case = make_case()

    def make_batch(key, batch_size):
        leaves, treedef = jax.tree.flatten(case.inputs)
        keys = jax.random.split(key, len(leaves))
        return treedef.unflatten(
            _random_like(key, x, (batch_size, *x.shape[1:]))
            for key, x in zip(keys, leaves, strict=True)
        )

    return Workload(
        title=title,
        init_params=lambda key: jax.tree.map(jnp.asarray, case.params),
        make_batch=make_batch,
        loss_fn=lambda params, batch, key: (case.loss(params, batch), None),
        tx=optax.adam(LEARNING_RATE),
        batch_sizes=batch_sizes,
    )


def _with_attention(
    title: str, make_case: Callable[..., small.Case], batch_sizes: dict[str, int]
) -> Workload:
    """Returns the workload of a case that `make_case(attention=...)` makes."""

    def kernel(*heads):
        q, k, v = (x.swapaxes(1, 2) for x in heads)
        return cudnn_attention(q, k, v, True)

    def with_cudnn():
        attention = kernel_in_half(kernel, small.causal_attention, length_axis=2)
        case = functools.partial(make_case, attention=attention)
        workload = _from_case(title, case, batch_sizes)
        return dataclasses.replace(workload, attention="cudnn")

    workload = _from_case(title, make_case, batch_sizes)
    return dataclasses.replace(workload, attention="xla", with_cudnn=with_cudnn)
