"""What `loss_curves` trains: a task, and the precisions that it is trained in."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax
from experiments.data import mnist, source_text
from experiments.data.splits import split
from experiments.models import classification
from experiments.models.deep_convnet import DeepConvNet
from experiments.models.gpt2 import GPT2
from experiments.models.objectives import next_token
from experiments.models.optimizers import one_cycle

POLICY = "mixed_bfloat16"
NUM_BYTES = 256
NUM_TEST_WINDOWS = 64


class Variant(NamedTuple):
    """A task in one precision.

    Attributes:
      init: `key -> params`, float32, the same numbers in every precision.
      loss_fn: as `make_train_step` takes it.
      evaluate: `state -> {"loss": ...}` on the test set; in float32, so that only the
        weights differ between precisions.
      policy: precision policy of the train step.
      autocast: how the train step applies it.
      init_model_state: `key -> model_state`; None for a model without one.
    """

    init: Callable[[jax.Array], Any]
    loss_fn: Callable[..., Any]
    evaluate: Callable[[mpjax.TrainState], dict[str, float]]
    policy: str | mpjax.PolicyRules = "float32"
    autocast: bool = True
    init_model_state: Callable[[jax.Array], Any] | None = None


class Task(NamedTuple):
    """A model and its data.

    Attributes:
      title: what it is, for headings.
      variants: by precision; "float32" is among them.
      make_batches: `seed -> batches`, in the same order for every precision.
      tx: the optimizer, without loss scaling.
      num_steps: steps of a run.
      step_options: further arguments of `make_train_step`.
      facts: what identifies the data, for the result file.
    """

    title: str
    variants: dict[str, Variant]
    make_batches: Callable[[int], Iterator[Any]]
    tx: optax.GradientTransformation
    num_steps: int
    step_options: dict[str, Any]
    facts: dict[str, Any]


def transformer(
    *, width: int, num_layers: int, length: int, batch_size: int, num_steps: int
) -> Task:
    """Returns GPT-2's architecture on bytes of source files.

    By hand, every layer has `dtype=bfloat16`. In a scan, autocast carries the residual
    stream in float32 from layer to layer; unrolled, it is stored in half, as by hand.

    Args:
      width: units of a token, 32 per head.
      num_layers: number of blocks.
      length: bytes that the model sees.
      batch_size: windows of so many bytes per step.
      num_steps: steps of a run.
    """
    text = source_text.load()
    fields: dict[str, Any] = {
        "vocabulary_size": NUM_BYTES,
        "max_length": length,
        "width": width,
    }
    fields |= {"num_layers": num_layers, "num_heads": max(1, width // 32)}
    plain, scanned = GPT2(**fields), GPT2(**fields, scan=True)
    half = GPT2(**fields, dtype=jnp.bfloat16)
    tokens = jnp.zeros((1, length), jnp.int32)
    init = lambda key: plain.init(key, tokens)["params"]
    stacked_init = lambda key: stack_blocks(init(key), num_layers)
    starts = np.linspace(0, len(text.test) - length - 1, NUM_TEST_WINDOWS, dtype=int)
    test_batch = _windows(text.test, starts, length)
    evaluate, evaluate_scanned = (
        _make_evaluate(_byte_loss(model), test_batch) for model in (plain, scanned)
    )

    def make_batches(seed):
        rng = np.random.default_rng(seed)
        while True:
            starts = rng.integers(0, len(text.train) - length, batch_size)
            yield _windows(text.train, starts, length)

    return Task(
        title=f"transformer, {num_layers} layers, {width} wide, on bytes of source",
        variants={
            "float32": Variant(init, _byte_loss(plain), evaluate),
            "by hand": Variant(init, _byte_loss(half), evaluate),
            "autocast": Variant(init, _byte_loss(plain), evaluate, POLICY),
            "autocast, scan": Variant(
                stacked_init, _byte_loss(scanned), evaluate_scanned, POLICY
            ),
        },
        make_batches=make_batches,
        tx=optax.adam(one_cycle(1e-3, num_steps)),
        num_steps=num_steps,
        step_options={},
        facts={"num_files": text.num_files, "sha256": text.sha256},
    )


def convnet(*, dataset: str, num_images: int, batch_size: int, num_epochs: int) -> Task:
    """Returns DeepConvNet on images of digits, as in `experiments.mnist_convnet`.

    By hand, parameters and images are cast to bfloat16.

    Args:
      dataset: "mnist" or "digits".
      num_images: how many of the training images to train on.
      batch_size: images per step.
      num_epochs: passes over them.
    """
    images = mnist.load(dataset)
    splits = split(
        images, num_images, batch_size=batch_size, flag=f"--num-images {num_images}"
    )
    model = DeepConvNet()
    num_steps = splits.train.num_batches * num_epochs
    image = jnp.zeros((1, *splits.train.image_shape))
    init = lambda key: model.init(key, image)["params"]
    loss_fn = classification.make_loss_fn(model, has_dropout=True)
    evaluate_split = classification.make_evaluate(model, splits, "float32")
    evaluate = lambda state: evaluate_split(state, "test")
    return Task(
        title=f"DeepConvNet on {images.name}",
        variants={
            "float32": Variant(init, loss_fn, evaluate),
            "by hand": Variant(init, loss_fn, evaluate, POLICY, autocast=False),
            "autocast": Variant(init, loss_fn, evaluate, POLICY),
        },
        make_batches=splits.train.shuffled,
        tx=optax.adam(one_cycle(2e-3, num_steps)),
        num_steps=num_steps,
        step_options={"loss_weight": classification.count_examples},
        facts={"dataset": images.name},
    )


def stack_blocks(params: Any, num_layers: int) -> dict[str, Any]:
    """Returns the parameters of `GPT2` as those of `GPT2(scan=True)`."""
    others = {k: v for k, v in params.items() if not k.startswith("Block_")}
    blocks = [params[f"Block_{i}"] for i in range(num_layers)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)
    return {**others, "Scan_ScannedBlock_0": stacked}


def _byte_loss(model: GPT2) -> Callable[..., Any]:
    objective = next_token(model.max_length, NUM_BYTES)

    def loss_fn(params, batch, key):
        apply: Any = functools.partial(model.apply, {"params": params})
        return objective.loss(apply, batch, key), {}

    return loss_fn


def _make_evaluate(loss_fn: Callable[..., Any], batch: Any) -> Callable[..., Any]:
    loss = jax.jit(lambda params: loss_fn(params, batch, None)[0])
    return lambda state: {"loss": float(loss(state.params))}


def _windows(text: np.ndarray, starts: np.ndarray, length: int) -> dict[str, Any]:
    """Returns a batch for `next_token` of the bytes that follow each start."""
    tokens = text[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    return {"tokens": tokens[:, :-1], "label": tokens[:, 1:]}
