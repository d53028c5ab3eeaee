"""Compiles attention by cuDNN, in three libraries, for an H100; prints JSON.

    python tests/helpers/h100_attention.py       # needs pip install "jax[cuda13]"

tests/autocast/test_h100.py runs it in a process of its own: the settings must precede
JAX.
"""

import functools
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen, nnx

sys.path.insert(0, str(Path(__file__).parents[2]))
import mpjax
from mpjax.cost import get_device
from mpjax.cost._compile import compile_for

BATCH, LENGTH, NUM_HEADS, WIDTH = 4, 1024, 8, 512
X = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
KEY = jax.random.key(0)


def attend(query, key, value, *, implementation, **_):
    """Causal attention over arrays of shape (batch, length, heads, width)."""
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=implementation
    )


def linen_model(attention_fn):
    """Returns parameters, and the model as a function of parameters and inputs."""
    model = linen.MultiHeadDotProductAttention(NUM_HEADS, attention_fn=attention_fn)
    # The kernel refuses float32, so the parameters are made under autocast too.
    params = jax.eval_shape(mpjax.autocast(model.init), KEY, X)
    return params, model.apply


def nnx_model(attention_fn):
    """As `linen_model`, in Flax NNX."""

    def make():
        return nnx.MultiHeadAttention(
            NUM_HEADS,
            WIDTH,
            decode=False,
            attention_fn=attention_fn,
            rngs=nnx.Rngs(0),
        )

    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def apply(params, x):
        others = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), rest)
        return nnx.merge(graphdef, params, others, copy=True)(x)

    return params, apply


class EquinoxAttention(eqx.Module):
    """Self-attention in Equinox, whose own layer has no place for a kernel."""

    layers: list[eqx.nn.Linear]
    attention_fn: object = eqx.field(static=True)

    def __init__(self, attention_fn, key):
        make = functools.partial(eqx.nn.Linear, WIDTH, WIDTH)
        self.layers = [make(key=k) for k in jax.random.split(key, 4)]
        self.attention_fn = attention_fn

    def __call__(self, x):
        *to_heads, out = [jax.vmap(jax.vmap(layer)) for layer in self.layers]
        split = (BATCH, LENGTH, NUM_HEADS, WIDTH // NUM_HEADS)
        heads = self.attention_fn(*(layer(x).reshape(split) for layer in to_heads))
        return out(heads.reshape(x.shape))


def equinox_model(attention_fn):
    """As `linen_model`, in Equinox."""
    model = eqx.filter_eval_shape(EquinoxAttention, attention_fn, KEY)
    params, static = eqx.partition(model, lambda x: hasattr(x, "dtype"))
    return params, lambda params, x: eqx.combine(params, static)(x)


def stacked(params, apply):
    """Two rematerialized blocks in a scan."""
    stack = lambda s: jax.ShapeDtypeStruct((2, *s.shape), s.dtype)

    def run(params, x):
        block = jax.checkpoint(lambda x, params: (x + apply(params, x), None))
        return jax.lax.scan(block, x, params)[0]

    return jax.tree.map(stack, params), run


def by_hand_casts(params, apply):
    """A model whose parameters and inputs are cast; autocast finds nothing to do."""
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    return params, lambda params, x: apply(half(params), half(x)).astype(jnp.float32)


MODELS = {"linen": linen_model, "nnx": nnx_model, "equinox": equinox_model}


def row(compile_for_h100, params, apply):
    """Compiles a gradient under autocast; returns what `main` prints of it."""
    loss = lambda params, x: (apply(params, x) ** 2).mean()
    compiled = compile_for_h100(mpjax.autocast(jax.value_and_grad(loss)), params, X)
    text = compiled.as_text()
    return {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "forward": text.count('"__cudnn$fmhaSoftmax"'),
        "backward": text.count('"__cudnn$fmhaSoftmaxBackward"'),
        "dtypes": sorted({str(x.dtype) for x in jax.tree.leaves(compiled.out_info)}),
    }


def main():
    """Prints, per model, temporaries in bytes and calls of cuDNN's attention."""
    compile_for_h100 = functools.partial(compile_for, get_device("h100"))
    kernels = {
        "cudnn": mpjax.half_precision(
            functools.partial(attend, implementation="cudnn")
        ),
        "unfused": functools.partial(attend, implementation="xla"),
    }
    rows = {}
    for name, make in MODELS.items():
        for kernel, attention_fn in kernels.items():
            rows[f"{name} {kernel}"] = row(compile_for_h100, *make(attention_fn))
    for kernel, attention_fn in kernels.items():
        model = stacked(*equinox_model(attention_fn))
        rows[f"stacked {kernel}"] = row(compile_for_h100, *model)
    by_hand = by_hand_casts(*equinox_model(kernels["cudnn"]))
    rows["equinox by hand"] = row(compile_for_h100, *by_hand)
    print(json.dumps({"jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
