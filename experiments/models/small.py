"""Eight small models as plain functions, on which autocast is measured.

Each is `loss(params, inputs) -> scalar` with float32 parameters, written as a user
would: logits are cast to float32 before the loss, sums are means. `hand_cast` is what
jmp users do: parameters and inputs cast to half, the same function.

B: batch, T: time, D: features, C: classes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with its parameters and inputs, as NumPy arrays."""

    loss: Callable[[Any, Any], jax.Array]
    params: Any
    inputs: Any


def gradient(loss, params, inputs, *, scale: float = 1.0) -> Any:
    """Returns float64 gradients, taken through a loss scaled by `scale`.

    It is compiled once per loss and scale.
    """
    grads = _compiled(loss, None, scale)(params, inputs)
    return jax.tree.map(lambda g: np.asarray(g, np.float64) / scale, grads)


def autocast_gradient(loss, params, inputs, policy, *, scale: float = 1.0) -> Any:
    """Returns the gradient under autocast around `jax.grad`, as in the train step."""
    grads = _compiled(loss, policy, scale)(params, inputs)
    return jax.tree.map(lambda g: np.asarray(g, np.float64) / scale, grads)


def inner_autocast_gradient(loss, params, inputs, policy, *, scale: float = 1.0):
    """Returns the gradient with autocast inside `jax.grad`, around the loss."""
    return gradient(_inner_autocast(loss, policy), params, inputs, scale=scale)


@functools.cache
def _compiled(loss, policy: str | None, scale: float) -> Callable[..., Any]:
    grad = jax.grad(lambda params, inputs: loss(params, inputs) * scale)
    return jax.jit(grad if policy is None else mpjax.autocast(grad, policy))


@functools.cache
def _inner_autocast(loss, policy: str) -> Callable[..., Any]:
    return mpjax.autocast(loss, policy)


def oracle(case: Case) -> Any:
    """Returns the gradient in float64."""
    with jax.enable_x64(True):
        params, inputs = cast((case.params, case.inputs), np.float64)
        return gradient(case.loss, params, inputs)


@functools.cache
def hand_cast(loss, dtype) -> Callable[[Any, Any], jax.Array]:
    """Returns the loss as jmp users write it: parameters and inputs cast to half."""
    return lambda params, inputs: loss(cast(params, dtype), cast(inputs, dtype))


def cast(tree: Any, dtype: Any) -> Any:
    """Casts the floating leaves."""

    def one(x):
        floating = jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
        return x.astype(dtype) if floating else x

    return jax.tree.map(one, tree)


def relative_error(grads: Any, truth: Any) -> float:
    """Returns ||grads - truth|| / ||truth|| over all leaves."""
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(truth), strict=True))
    error = sum(float(np.sum((g - t) ** 2)) for g, t in pairs)
    return (error / sum(float(np.sum(t**2)) for _, t in pairs)) ** 0.5


def mlp(
    seed: int = 0,
    *,
    batch_size: int = 128,
    sizes: Sequence[int] = (64, 256, 256, 10),
    matmul: Callable[..., jax.Array] = jnp.matmul,
) -> Case:
    """Returns the case of layers with biases and relu, from inputs to 10 classes."""
    rng = np.random.default_rng(seed)
    params = [_dense(rng, m, n) for m, n in itertools.pairwise(sizes)]
    x = _normal(rng, batch_size, sizes[0])
    inputs = {"x": x, "label": rng.integers(0, 10, batch_size)}

    def loss(params, inputs):
        x = inputs["x"]
        for layer in params[:-1]:
            x = jax.nn.relu(matmul(x, layer["w"]) + layer["b"])
        logits = matmul(x, params[-1]["w"]) + params[-1]["b"]
        return _cross_entropy(logits, inputs["label"])

    return Case(loss, params, inputs)


def convnet(seed: int = 0) -> Case:
    """Returns the case of two convolutions with BatchNorm (batch statistics)."""
    rng = np.random.default_rng(seed)
    params = {
        "conv_0": _normal(rng, 3, 3, 3, 16) / 27**0.5,
        "conv_1": _normal(rng, 3, 3, 16, 32) / 144**0.5,
        "norm_0": {"scale": _ones(16), "bias": _zeros(16)},
        "norm_1": {"scale": _ones(32), "bias": _zeros(32)},
        "dense": _dense(rng, 32 * 4 * 4, 10),
    }
    inputs = {"x": _normal(rng, 32, 16, 16, 3), "label": rng.integers(0, 10, 32)}

    def loss(params, inputs):
        x = inputs["x"]
        for i in range(2):
            x = jax.lax.conv_general_dilated(
                x,
                params[f"conv_{i}"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(_norm(x, params[f"norm_{i}"], axes=(0, 1, 2)))
            x = jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
            )
        x = x.reshape(x.shape[0], -1)
        return _cross_entropy(x @ params["dense"]["w"], inputs["label"])

    return Case(loss, params, inputs)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns causal attention (B, T, H, D) over arrays (B, H, T, D) of H heads."""
    logits = jnp.einsum("bhtk,bhsk->bhts", q, k) / q.shape[-1] ** 0.5
    mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(logits)
    return jnp.einsum("bhts,bhsk->bthk", weights, v)


def transformer_block(
    seed: int = 0,
    *,
    width: int = 128,
    length: int = 64,
    num_heads: int = 4,
    attention: Callable[..., jax.Array] = causal_attention,
) -> Case:
    """Computes pre-norm causal self-attention, and a gelu MLP."""
    rng = np.random.default_rng(seed)
    params = _block_params(rng, width, num_heads)

    def loss(params, inputs):
        return _mean_squared(_block(inputs["x"], params, attention), inputs)

    return Case(loss, params, _vectors(rng, length, width))


def transformer(
    seed: int = 0,
    *,
    width: int = 64,
    length: int = 32,
    num_heads: int = 4,
    num_layers: int = 3,
    attention: Callable[..., jax.Array] = causal_attention,
) -> Case:
    """Returns the case of transformer blocks in a scan over their parameters."""
    rng = np.random.default_rng(seed)
    layers = [_block_params(rng, width, num_heads) for _ in range(num_layers)]
    params = jax.tree.map(lambda *xs: np.stack(xs), *layers)

    def loss(params, inputs):
        block = lambda x, p: (_block(x, p, attention), None)
        x, _ = jax.lax.scan(block, inputs["x"], params)
        return _mean_squared(x, inputs)

    return Case(loss, params, _vectors(rng, length, width))


def _block_params(rng, width, num_heads):
    size = width // num_heads
    return {
        "qkv": _normal(rng, width, 3, num_heads, size) / width**0.5,
        "out": _normal(rng, num_heads, size, width) / width**0.5,
        "norm_0": {"scale": _ones(width), "bias": _zeros(width)},
        "norm_1": {"scale": _ones(width), "bias": _zeros(width)},
        "up": _dense(rng, width, 4 * width),
        "down": _dense(rng, 4 * width, width),
    }


def _block(x, params, attention):
    y = _norm(x, params["norm_0"], axes=(-1,))
    q, k, v = jnp.einsum("btd,dshk->sbhtk", y, params["qkv"])
    y = attention(q, k, v)
    x = x + jnp.einsum("bthk,hkd->btd", y, params["out"])
    y = _norm(x, params["norm_1"], axes=(-1,))
    y = jax.nn.gelu(y @ params["up"]["w"] + params["up"]["b"])
    return x + y @ params["down"]["w"] + params["down"]["b"]


def _vectors(rng, length, width):
    names = ("x", "target")
    return {name: _normal(rng, 4, length, width) for name in names}


def _mean_squared(x, inputs):
    error = x.astype(_at_least_float32(x)) - inputs["target"]
    return jnp.mean(error**2)


def bigru(seed: int = 0, *, length: int = 100, width: int = 64) -> Case:
    """Returns the case of a bidirectional GRU with an output at every step."""
    rng = np.random.default_rng(seed)
    cell = lambda: {
        "input": _dense(rng, 32, 3 * width),
        "hidden": _dense(rng, width, 3 * width),
    }
    params = {"forward": cell(), "backward": cell(), "out": _dense(rng, 2 * width, 8)}
    inputs = {
        "x": _normal(rng, 16, length, 32),
        "label": rng.integers(0, 8, (16, length)),
    }

    def run(cell, x, *, reverse):
        def step(h, x_t):
            i = x_t @ cell["input"]["w"] + cell["input"]["b"]
            g = h @ cell["hidden"]["w"] + cell["hidden"]["b"]
            (ir, iz, ic), (gr, gz, gc) = jnp.split(i, 3, -1), jnp.split(g, 3, -1)
            r, z = jax.nn.sigmoid(ir + gr), jax.nn.sigmoid(iz + gz)
            h = (1 - z) * jnp.tanh(ic + r * gc) + z * h
            return h, h

        h = jnp.zeros((x.shape[0], width), x.dtype)
        _, hs = jax.lax.scan(step, h, x.swapaxes(0, 1), reverse=reverse)
        return hs

    def loss(params, inputs):
        x = inputs["x"]
        both = [
            run(params["forward"], x, reverse=False),
            run(params["backward"], x, reverse=True),
        ]
        logits = jnp.concatenate(both, -1) @ params["out"]["w"] + params["out"]["b"]
        return _cross_entropy(logits.swapaxes(0, 1), inputs["label"])

    return Case(loss, params, inputs)


def rnn(seed: int = 0, *, length: int = 512, width: int = 64) -> Case:
    """Returns the case of a tanh RNN; every step adds to the gradient of one weight."""
    rng = np.random.default_rng(seed)
    recurrent, _ = np.linalg.qr(_normal(rng, width, width))
    params = {"w": recurrent.astype(np.float32), "u": _normal(rng, 16, width) / 4}
    inputs = {"x": _normal(rng, 16, length, 16), "target": _normal(rng, 16, width)}

    def loss(params, inputs):
        x = inputs["x"]

        def step(h, x_t):
            h = jnp.tanh(h @ params["w"] + x_t @ params["u"])
            return h, jnp.mean(h * inputs["target"])

        h = jnp.zeros((x.shape[0], width), x.dtype)
        _, losses = jax.lax.scan(step, h, x.swapaxes(0, 1))
        return jnp.mean(losses.astype(_at_least_float32(losses)))

    return Case(loss, params, inputs)


def tied(seed: int = 0, *, times: int = 64, width: int = 64) -> Case:
    """Returns the case of one weight used 64 times in a residual stream."""
    rng = np.random.default_rng(seed)
    params = {"w": _normal(rng, width, width) / width**0.5}
    inputs = {"x": _normal(rng, 32, width), "target": _normal(rng, 32, width)}

    def loss(params, inputs):
        x = inputs["x"]
        for _ in range(times):
            x = x + jnp.tanh(x @ params["w"]) / times**0.5
        error = x.astype(_at_least_float32(x)) - inputs["target"]
        return jnp.mean(error**2)

    return Case(loss, params, inputs)


def ctc(seed: int = 0, *, length: int = 40) -> Case:
    """Returns the case of a convolution and a dense layer under the CTC loss."""
    rng = np.random.default_rng(seed)
    params = {
        "conv": _normal(rng, 5, 20, 64) / 100**0.5,
        "out": _dense(rng, 64, 12),
    }
    inputs = {"x": _normal(rng, 8, length, 20), "label": rng.integers(1, 12, (8, 10))}
    ctc_loss = mpjax.full_precision(optax.ctc_loss)

    def loss(params, inputs):
        x = jax.lax.conv_general_dilated(
            inputs["x"],
            params["conv"],
            (1,),
            "SAME",
            dimension_numbers=("NTC", "TIO", "NTC"),
        )
        logits = jax.nn.relu(x) @ params["out"]["w"] + params["out"]["b"]
        logits = logits.astype(_at_least_float32(logits))
        labels = inputs["label"]
        paddings = jnp.zeros(logits.shape[:2], logits.dtype)
        label_paddings = jnp.zeros(labels.shape, logits.dtype)
        return jnp.mean(ctc_loss(logits, paddings, labels, label_paddings))

    return Case(loss, params, inputs)


CASES = {
    "mlp": mlp,
    "convnet": convnet,
    "transformer_block": transformer_block,
    "transformer": transformer,
    "bigru": bigru,
    "rnn": rnn,
    "tied": tied,
    "ctc": ctc,
}


def _norm(x, params, *, axes):
    full = x.astype(_at_least_float32(x))
    mean = full.mean(axes, keepdims=True)
    variance = ((full - mean) ** 2).mean(axes, keepdims=True)
    y = (full - mean) * jax.lax.rsqrt(variance + 1e-5)
    return (y * params["scale"] + params["bias"]).astype(x.dtype)


def _cross_entropy(logits, labels):
    logits = logits.astype(_at_least_float32(logits))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def _at_least_float32(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def _dense(rng, m, n):
    return {"w": _normal(rng, m, n) * (2 / m) ** 0.5, "b": _normal(rng, n) * 0.1}


def _ones(n):
    return np.ones(n, np.float32)


def _zeros(n):
    return np.zeros(n, np.float32)
