"""Models that people train, as workloads: in Flax, plainly written, of real sizes.

Each is a function of a size: "full", or "small" for tests, which has the same parts
with fewer layers and units. Its module has a `dtype` field. With None the model is
float32, which autocast takes; with half every layer, norms included, computes in half
from float32 parameters, which is mixed precision by hand. GPT-2 and Llama have an
`attention` field, too: `with_cudnn` gives the model whose attention is cuDNN's kernel
in half, under autocast and by hand; in float32, which the kernel refuses, it is as
before. ViT has no such form: the kernel refuses its odd number of tokens, 197.

    workload = REAL_MODELS["gpt2"]("full")
    workload.loss_fn                    # float32
    workload.by_hand(jnp.bfloat16)      # the same in bfloat16, but for the loss
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax

from experiments.benchmarks.workloads import LEARNING_RATE, Workload
from experiments.models import objectives
from experiments.models.attention import (
    cudnn_attention,
    kernel_in_half,
    xla_attention,
)
from experiments.models.deep_speech import DeepSpeech
from experiments.models.gpt2 import GPT2
from experiments.models.llama import Llama
from experiments.models.moe import MoETransformer
from experiments.models.objectives import Objective
from experiments.models.resnet import ResNet
from experiments.models.ssd.architecture import PRESETS
from experiments.models.ssd.network import SSD
from experiments.models.unet import UNet
from experiments.models.vit import ViT

SIZES = ("full", "small")


def resnet50(size: str, **fields: Any) -> Workload:
    """Returns ResNet-50 v1.5 on images of 224 x 224, with BatchNorm.

    Args:
      size: "full" or "small".
      **fields: of `ResNet`, such as `num_blocks`.
    """
    pixels, batch_size = 224, 128
    if size == "small":
        pixels, batch_size = 64, 16
        fields = {"num_blocks": (1, 1), "num_channels": 32, **fields}
    model = functools.partial(ResNet, **fields)
    objective = objectives.classification(pixels, 1000)
    return _workload("ResNet-50 v1.5", model, objective, batch_size)


def unet(size: str) -> Workload:
    """Returns a diffusion U-Net on images of 64 x 64, with attention at 16 x 16."""
    if size == "full":
        model, pixels, batch_size = UNet, 64, 32
    else:
        model = functools.partial(
            UNet, num_channels=32, multipliers=(1, 2), num_blocks=1
        )
        pixels, batch_size = 32, 16
    return _workload("diffusion U-Net", model, objectives.denoising(pixels), batch_size)


def vit_b16(size: str) -> Workload:
    """Returns ViT-B/16 on images of 224 x 224, with exact GELU."""
    if size == "full":
        model, pixels, batch_size = ViT, 224, 64
    else:
        model = functools.partial(ViT, width=128, num_layers=2, num_heads=4)
        pixels, batch_size = 224, 16
    objective = objectives.classification(pixels, 1000)
    return _workload("ViT-B/16", model, objective, batch_size)


def gpt2(size: str, **fields: Any) -> Workload:
    """Returns GPT-2 (124 million parameters) on 1024 tokens.

    Args:
      size: "full" or "small".
      **fields: of `GPT2`, such as `scan` or `attention`.
    """
    length, vocabulary_size, batch_size = 1024, 50257, 8
    if size == "small":
        length, vocabulary_size = 256, 1024
        small = {"width": 128, "num_layers": 2, "num_heads": 4, "max_length": length}
        fields = {**small, "vocabulary_size": vocabulary_size, **fields}
    model = functools.partial(GPT2, **fields)
    objective = objectives.next_token(length, vocabulary_size)
    options = ", ".join(name for name, value in fields.items() if value is True)
    title = f"GPT-2 124M{options and f' ({options})'}"
    return _transformer(title, model, objective, batch_size)


def llama(size: str, **fields: Any) -> Workload:
    """Returns eight Llama blocks, 1024 wide, on 1024 tokens.

    Args:
      size: "full" or "small".
      **fields: of `Llama`, such as `attention`.
    """
    length, vocabulary_size, batch_size = 1024, 32_000, 8
    if size == "small":
        length, vocabulary_size = 256, 1024
        small = {"width": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
        small |= {"num_hidden": 384, "vocabulary_size": vocabulary_size}
        fields = {**small, **fields}
    model = functools.partial(Llama, **fields)
    objective = objectives.next_token(length, vocabulary_size)
    return _transformer("Llama", model, objective, batch_size)


def deep_speech2(size: str) -> Workload:
    """Returns two convolutions and five bidirectional GRUs on 600 frames, with CTC."""
    if size == "full":
        model = DeepSpeech
        frames, frequencies, labels, batch_size = 600, 161, 60, 16
    else:
        model = functools.partial(
            DeepSpeech, num_channels=8, num_units=64, num_layers=2
        )
        frames, frequencies, labels, batch_size = 200, 80, 20, 16
    objective = objectives.transcription(frames, frequencies, labels, 29)
    return _workload("Deep Speech 2", model, objective, batch_size)


def moe(size: str, *, ragged: bool) -> Workload:
    """Returns two layers of eight experts on 8 x 1024 tokens, each sent to two.

    Args:
      size: "full" or "small".
      ragged: whether tokens are sorted by expert; otherwise one-hot einsums.
    """
    model = functools.partial(MoETransformer, ragged=ragged)
    length, width, batch_size = 1024, 1024, 8
    if size == "small":
        model = functools.partial(model, num_hidden=256, num_experts=4)
        length, width = 256, 128
    title = f"mixture of experts, {'ragged' if ragged else 'dense'} dispatch"
    return _workload(title, model, objectives.regression(length, width), batch_size)


def ssd300(size: str) -> Workload:
    """Returns the detector SSD300 on images of 300 x 300, with VGG-16 as its trunk."""
    architecture, num_classes, batch_size = PRESETS["ssd300"], 20, 32
    if size == "small":
        architecture, batch_size = PRESETS["small"], 16
    model = functools.partial(SSD, num_classes, architecture)
    title = "SSD300" if size == "full" else "small SSD"
    objective = objectives.detection(architecture, num_classes)
    return _workload(title, model, objective, batch_size)


REAL_MODELS: dict[str, Callable[[str], Workload]] = {
    "resnet50": resnet50,
    "unet": unet,
    "vit_b16": vit_b16,
    "gpt2": gpt2,
    "gpt2_tanh": functools.partial(gpt2, tanh_gelu=True),
    "gpt2_scan": functools.partial(gpt2, scan=True),
    "gpt2_scan_remat": functools.partial(gpt2, scan=True, remat=True),
    "llama": llama,
    "llama_sdpa": functools.partial(llama, attention=xla_attention),
    "deep_speech2": deep_speech2,
    "moe_dense": functools.partial(moe, ragged=False),
    "moe_ragged": functools.partial(moe, ragged=True),
    "ssd300": ssd300,
}


def _transformer(
    title: str,
    make_model: Callable[..., Any],
    objective: Objective,
    batch_size: int,
) -> Workload:
    """As `_workload`, for a model with an `attention` field."""

    def with_cudnn():
        attention = kernel_in_half(cudnn_attention, make_model().attention)
        make = functools.partial(make_model, attention=attention)
        workload = _workload(title, make, objective, batch_size)
        return dataclasses.replace(workload, attention="cudnn")

    workload = _workload(title, make_model, objective, batch_size)
    return dataclasses.replace(workload, attention="xla", with_cudnn=with_cudnn)


def _workload(
    title: str,
    make_model: Callable[..., nn.Module],
    objective: Objective,
    batch_size: int,
) -> Workload:
    """Returns a model with AdamW; `make_model(dtype=...)` makes it."""

    def init(key):
        variables: dict[str, Any] = {}

        def apply(*inputs):
            output, made = make_model(dtype=None).init_with_output(key, *inputs)
            variables.update(made)
            return output

        objective.loss(apply, objective.make_batch(key, 1), key)
        return variables

    collections = jax.eval_shape(init, jax.random.key(0)).keys() - {"params"}

    def init_model_state(key):
        variables = init(key)
        return {name: variables[name] for name in collections}

    def by_hand(dtype):
        model = make_model(dtype=dtype)
        make_loss_fn = _stateful_loss_fn if collections else _loss_fn
        return make_loss_fn(model, objective.loss)

    return Workload(
        title=f"{title}, AdamW",
        init_params=lambda key: init(key)["params"],
        make_batch=objective.make_batch,
        loss_fn=by_hand(None),
        tx=optax.adamw(LEARNING_RATE),
        batch_sizes={"cpu": 1, "gpu": batch_size},
        init_model_state=init_model_state if collections else None,
        by_hand=by_hand,
    )


def _loss_fn(model: nn.Module, loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    def loss_fn(params, batch, key):
        apply = functools.partial(model.apply, {"params": params})
        return loss(apply, batch, key), None

    return loss_fn


def _stateful_loss_fn(
    model: nn.Module, loss: Callable[..., jax.Array]
) -> Callable[..., Any]:
    def loss_fn(params, model_state, batch, key):
        new_state: dict[str, Any] = {}

        def apply(*inputs):
            output, changed = model.apply(
                {"params": params, **model_state}, *inputs, mutable=list(model_state)
            )
            new_state.update(changed)
            return output

        value = loss(apply, batch, key)
        return value, (new_state, None)

    return loss_fn
