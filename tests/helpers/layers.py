"""Other libraries' layers as pure functions: Linen, NNX, Equinox and Haiku.

A case is a function `fn(params, x) -> (y, state)`, with parameters as the library
initialises them. Layers without a matmul of their own (norms, pooling, dropout) stand
between two layers with a matmul, so that their input is half.

B: batch, T: time, H, W: height and width, D: features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mpjax._jaxpr.core import dtype_of, walk

KEY = jax.random.key(3)
MATMUL_NAMES = ("dot_general", "conv_general_dilated")


class Case(NamedTuple):
    """A layer: its function, parameters and input."""

    fn: Callable[[Any, Any], tuple[Any, Any]]
    params: Any
    x: Any
    state: Any = None


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matmul_dtypes(closed):
    """Returns the dtypes of each matmul's operands and output, by name scope."""
    found = {}
    for eqn, scope, _ in walk(closed):
        if eqn.primitive.name in MATMUL_NAMES:
            dtypes = {str(dtype_of(v)) for v in (*eqn.invars, *eqn.outvars)}
            found.setdefault(scope, []).append(dtypes)
    return found


FLAT = normal(8, 16)  # (B, D)
SEQUENCE = normal(4, 6, 16)  # (B, T, D)
IMAGE = normal(4, 8, 8, 4)  # (B, H, W, D)
# Small, so that no two numbers of a window are nearer than a rounding to half (then the
# maximum is at the same place), and because XLA on a CPU, from jax 0.12 on, adds up in
# bfloat16 where both operands of a matmul are transposed.
SMALL = normal(2, 4, 4, 4)
TOKENS = np.random.default_rng(0).integers(0, 12, (4, 6))
CAUSAL = np.tril(np.ones((1, 1, 6, 6), bool))


def linen(module, x, *, wrap=True, **kwargs):
    """Makes a case of a Linen module; with `wrap`, between two dense layers."""
    if wrap:
        module = nn.Sequential([nn.Dense(16), module, nn.Dense(8)])
    variables = dict(module.init(jax.random.key(0), x, **kwargs))
    params = variables.pop("params")

    def fn(params, x):
        y, state = module.apply(
            {"params": params, **variables},
            x,
            mutable=list(variables) or ["intermediates"],
            rngs={"dropout": KEY},
            **kwargs,
        )
        return y, state

    return Case(fn, params, x, variables)


def linen_step(cell, x):
    """Makes a case of a Linen cell for one step."""
    carry = cell.initialize_carry(jax.random.key(1), x.shape)
    carry = jax.tree.map(lambda c: c + 0.5, carry)
    params = cell.init(jax.random.key(0), carry, x)
    return Case(lambda p, x: (cell.apply(p, carry, x), None), params, x)


class TiedLinen(nn.Module):
    """An embedding, and logits from the same table."""

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(12, 16)
        return embed.attend(embed(x))


LINEN = {
    "Dense": lambda: linen(nn.Dense(8), FLAT, wrap=False),
    "DenseGeneral": lambda: linen(nn.DenseGeneral((4, 3)), FLAT, wrap=False),
    "Conv": lambda: linen(nn.Conv(8, (3, 3), strides=2), IMAGE, wrap=False),
    "ConvTranspose": lambda: linen(
        nn.ConvTranspose(8, (3, 3), strides=(2, 2)), IMAGE, wrap=False
    ),
    "Embed": lambda: linen(TiedLinen(), TOKENS, wrap=False),
    "MultiHeadDotProductAttention": lambda: linen(
        nn.MultiHeadDotProductAttention(4), SEQUENCE, mask=CAUSAL, wrap=False
    ),
    "MultiHeadDotProductAttention_dropout": lambda: linen(
        nn.MultiHeadDotProductAttention(4, dropout_rate=0.3, deterministic=False),
        SEQUENCE,
        wrap=False,
    ),
    "LSTMCell": lambda: linen_step(nn.LSTMCell(8), FLAT),
    "RNN_LSTM": lambda: linen(nn.RNN(nn.LSTMCell(8)), SEQUENCE, wrap=False),
    "RNN_OptimizedLSTM": lambda: linen(
        nn.RNN(nn.OptimizedLSTMCell(8)), SEQUENCE, wrap=False
    ),
    "RNN_GRU": lambda: linen(nn.RNN(nn.GRUCell(8)), SEQUENCE, wrap=False),
    "Bidirectional": lambda: linen(
        nn.Bidirectional(nn.RNN(nn.LSTMCell(8)), nn.RNN(nn.GRUCell(8))),
        SEQUENCE,
        seq_lengths=np.array([6, 3, 5, 1]),
        wrap=False,
    ),
    "BatchNorm_train": lambda: linen(nn.BatchNorm(use_running_average=False), FLAT),
    "BatchNorm_eval": lambda: linen(nn.BatchNorm(use_running_average=True), FLAT),
    "LayerNorm": lambda: linen(nn.LayerNorm(), FLAT),
    "RMSNorm": lambda: linen(nn.RMSNorm(), FLAT),
    "GroupNorm": lambda: linen(nn.GroupNorm(4), SMALL),
    "InstanceNorm": lambda: linen(nn.InstanceNorm(), SMALL),
    "SpectralNorm": lambda: linen(
        nn.SpectralNorm(nn.Dense(8)), FLAT, update_stats=True, wrap=False
    ),
    "Dropout": lambda: linen(nn.Dropout(0.4, deterministic=False), FLAT),
    "max_pool": lambda: linen(lambda x: nn.max_pool(x, (2, 2), (2, 2)), SMALL),
    "avg_pool": lambda: linen(lambda x: nn.avg_pool(x, (3, 3), (1, 1)), SMALL),
}


def of_nnx(make, x, *, wrap=True, **kwargs):
    """Makes a case of an NNX module, split; with `wrap`, between two dense layers."""
    rngs = nnx.Rngs(0)
    module = make(rngs)
    if wrap:
        module = nnx.Sequential(
            nnx.Linear(x.shape[-1], 16, rngs=rngs), module, nnx.Linear(16, 8, rngs=rngs)
        )
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def fn(params, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        y = model(x, **kwargs)
        return y, nnx.split(model, nnx.Param, ...)[2]

    return Case(fn, params, x, rest)


class TiedNNX(nnx.Module):
    """An embedding, and logits from the same table."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 16, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(self.embed(x))


def nnx_rnn(cell):
    return lambda: of_nnx(lambda r: nnx.RNN(cell(16, 8, rngs=r)), SEQUENCE, wrap=False)


NNX = {
    "Linear": lambda: of_nnx(lambda r: nnx.Linear(16, 8, rngs=r), FLAT, wrap=False),
    "LinearGeneral": lambda: of_nnx(
        lambda r: nnx.LinearGeneral(16, (4, 3), rngs=r), FLAT, wrap=False
    ),
    "Conv": lambda: of_nnx(
        lambda r: nnx.Conv(4, 8, (3, 3), strides=2, rngs=r), IMAGE, wrap=False
    ),
    "ConvTranspose": lambda: of_nnx(
        lambda r: nnx.ConvTranspose(4, 8, (3, 3), strides=2, rngs=r), IMAGE, wrap=False
    ),
    "Embed": lambda: of_nnx(TiedNNX, TOKENS, wrap=False),
    "MultiHeadAttention": lambda: of_nnx(
        lambda r: nnx.MultiHeadAttention(4, 16, decode=False, rngs=r),
        SEQUENCE,
        mask=CAUSAL,
        wrap=False,
    ),
    "LoRA": lambda: of_nnx(
        lambda r: nnx.LoRA(16, 4, 16, rngs=r, b_initializer=nnx.initializers.normal()),
        FLAT,
    ),
    "RNN_LSTM": nnx_rnn(nnx.LSTMCell),
    "RNN_GRU": nnx_rnn(nnx.GRUCell),
    "BatchNorm_train": lambda: of_nnx(lambda r: nnx.BatchNorm(16, rngs=r), FLAT),
    "BatchNorm_eval": lambda: of_nnx(
        lambda r: nnx.BatchNorm(16, use_running_average=True, rngs=r), FLAT
    ),
    "LayerNorm": lambda: of_nnx(lambda r: nnx.LayerNorm(16, rngs=r), FLAT),
    "RMSNorm": lambda: of_nnx(lambda r: nnx.RMSNorm(16, rngs=r), FLAT),
    "GroupNorm": lambda: of_nnx(
        lambda r: nnx.GroupNorm(16, num_groups=4, rngs=r), SMALL
    ),
    "Dropout": lambda: of_nnx(lambda r: nnx.Dropout(0.4, rngs=r), FLAT),
    "max_pool": lambda: of_nnx(
        lambda r: lambda x: nnx.max_pool(x, (2, 2), (2, 2)), SMALL
    ),
    "avg_pool": lambda: of_nnx(
        lambda r: lambda x: nnx.avg_pool(x, (3, 3), (1, 1)), SMALL
    ),
}


def keys():
    """Returns fresh PRNG keys."""
    return iter(jax.random.split(jax.random.key(0), 8))


def equinox(make, x, call=lambda m, x: jax.vmap(m)(x)):
    """Makes a case of an Equinox module, partitioned."""
    params, static = eqx.partition(make(keys()), eqx.is_inexact_array)
    return Case(lambda p, x: (call(eqx.combine(p, static), x), None), params, x)


def between(layer):
    """Puts an Equinox layer between two linear layers, on one example (D,)."""
    return lambda k: eqx.nn.Sequential(
        [eqx.nn.Linear(16, 16, key=next(k)), layer, eqx.nn.Linear(16, 8, key=next(k))]
    )


def between_convs(layer):
    """Puts an Equinox layer between two convolutions, on one image (D, H, W)."""
    return lambda k: eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(8, 8, 3, key=next(k)),
            layer,
            eqx.nn.Conv2d(8, 4, 1, key=next(k)),
        ]
    )


def unrolled(cell, x):
    """Runs an Equinox cell over the time axis of (B, T, D)."""

    def one(x):
        zeros = jnp.zeros(cell.hidden_size)
        carry = (zeros, zeros) if isinstance(cell, eqx.nn.LSTMCell) else zeros
        return jax.lax.scan(lambda c, x: (cell(x, c), c), carry, x)

    return jax.vmap(one)(x)


def equinox_stateful(make, x, *, inference=False):
    """Makes a case of an Equinox module with a state, on a batch."""
    model, state = eqx.nn.make_with_state(make)(keys())
    model = eqx.nn.inference_mode(model, inference)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, x):
        model = eqx.combine(params, static)
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return run(x, state)

    return Case(fn, params, x, state)


def with_batch_norm(k):
    return between(eqx.nn.BatchNorm(16, "batch", mode="batch"))(k)


def with_spectral_norm(k):
    linear = eqx.nn.Linear(16, 16, key=next(k))
    return between(eqx.nn.SpectralNorm(linear, "weight", key=next(k)))(k)


CHANNELS_FIRST = normal(4, 8, 8, 8)
SMALL_CHANNELS_FIRST = normal(2, 8, 6, 6)

EQUINOX = {
    "Linear": lambda: equinox(lambda k: eqx.nn.Linear(16, 8, key=next(k)), FLAT),
    "Conv2d": lambda: equinox(
        lambda k: eqx.nn.Conv2d(8, 4, 3, stride=2, key=next(k)), CHANNELS_FIRST
    ),
    "ConvTranspose2d": lambda: equinox(
        lambda k: eqx.nn.ConvTranspose2d(8, 4, 3, stride=2, key=next(k)), CHANNELS_FIRST
    ),
    "Embedding": lambda: equinox(
        lambda k: (
            eqx.nn.Embedding(12, 16, key=next(k)),
            eqx.nn.Linear(16, 8, key=next(k)),
        ),
        TOKENS[:, 0],
        lambda m, x: jax.vmap(lambda x: m[1](m[0](x)))(x),
    ),
    "MultiheadAttention": lambda: equinox(
        lambda k: eqx.nn.MultiheadAttention(4, 16, key=next(k)),
        SEQUENCE,
        lambda m, x: jax.vmap(lambda x: m(x, x, x, mask=CAUSAL[0, 0]))(x),
    ),
    "LSTMCell": lambda: equinox(
        lambda k: eqx.nn.LSTMCell(16, 8, key=next(k)), SEQUENCE, unrolled
    ),
    "GRUCell": lambda: equinox(
        lambda k: eqx.nn.GRUCell(16, 8, key=next(k)), SEQUENCE, unrolled
    ),
    "BatchNorm_train": lambda: equinox_stateful(with_batch_norm, FLAT),
    "BatchNorm_eval": lambda: equinox_stateful(with_batch_norm, FLAT, inference=True),
    "SpectralNorm": lambda: equinox_stateful(with_spectral_norm, FLAT),
    "LayerNorm": lambda: equinox(between(eqx.nn.LayerNorm(16)), FLAT),
    "RMSNorm": lambda: equinox(between(eqx.nn.RMSNorm(16)), FLAT),
    "GroupNorm": lambda: equinox(between(eqx.nn.GroupNorm(4, 16)), FLAT),
    "Dropout": lambda: equinox(
        between(eqx.nn.Dropout(0.4)),
        FLAT,
        lambda m, x: jax.vmap(m)(x, key=jax.random.split(KEY, len(x))),
    ),
    "MaxPool2d": lambda: equinox(
        between_convs(eqx.nn.MaxPool2d(2, 2)), SMALL_CHANNELS_FIRST
    ),
    "AvgPool2d": lambda: equinox(between_convs(eqx.nn.AvgPool2d(3, 1)), CHANNELS_FIRST),
}


def haiku(layer, x, *, wrap=True):
    """Makes a case of a Haiku layer; with `wrap`, between two linear layers."""

    def forward(x):
        if not wrap:
            return layer(x)
        return hk.Linear(8)(layer(hk.Linear(16)(x)))

    transformed = hk.transform_with_state(forward)
    params, state = transformed.init(jax.random.key(0), x * 2)
    return Case(lambda p, x: transformed.apply(p, state, KEY, x), params, x, state)


def haiku_rnn(make):
    def run(x):
        cell = make()
        return hk.dynamic_unroll(cell, x, cell.initial_state(len(x)), time_major=False)

    return lambda: haiku(run, SEQUENCE, wrap=False)


def haiku_attention(x):
    attention = hk.MultiHeadAttention(4, 8, w_init=hk.initializers.VarianceScaling())
    return attention(x, x, x, mask=CAUSAL)


def haiku_batch_norm(is_training):
    return lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training or hk.running_init())


HAIKU = {
    "Linear": lambda: haiku(lambda x: hk.Linear(8)(x), FLAT, wrap=False),
    "MLP": lambda: haiku(
        lambda x: hk.nets.MLP([16, 4], activation=jax.nn.gelu)(x), FLAT, wrap=False
    ),
    "Conv2D": lambda: haiku(lambda x: hk.Conv2D(8, 3, 2)(x), IMAGE, wrap=False),
    "Conv2DTranspose": lambda: haiku(
        lambda x: hk.Conv2DTranspose(8, 3, 2)(x), IMAGE, wrap=False
    ),
    "Embed": lambda: haiku(
        lambda x: hk.Linear(8)(hk.Embed(12, 16)(x)), TOKENS, wrap=False
    ),
    "MultiHeadAttention": lambda: haiku(haiku_attention, SEQUENCE, wrap=False),
    "LSTM": haiku_rnn(lambda: hk.LSTM(8)),
    "GRU": haiku_rnn(lambda: hk.GRU(8)),
    "VanillaRNN": haiku_rnn(lambda: hk.VanillaRNN(8)),
    "BatchNorm_train": lambda: haiku(haiku_batch_norm(True), FLAT),
    "BatchNorm_eval": lambda: haiku(haiku_batch_norm(False), FLAT),
    "LayerNorm": lambda: haiku(lambda x: hk.LayerNorm(-1, True, True)(x), FLAT),
    "RMSNorm": lambda: haiku(lambda x: hk.RMSNorm(-1)(x), FLAT),
    "GroupNorm": lambda: haiku(lambda x: hk.GroupNorm(4)(x), SMALL),
    "dropout": lambda: haiku(lambda x: hk.dropout(hk.next_rng_key(), 0.4, x), FLAT),
    "max_pool": lambda: haiku(
        lambda x: hk.max_pool(x, (2, 2, 1), (2, 2, 1), "SAME"), SMALL
    ),
    "avg_pool": lambda: haiku(lambda x: hk.avg_pool(x, (3, 3, 1), 1, "SAME"), SMALL),
}

LIBRARIES = {"linen": LINEN, "nnx": NNX, "equinox": EQUINOX, "haiku": HAIKU}
CASES = {
    f"{library}-{name}": make
    for library, table in LIBRARIES.items()
    for name, make in table.items()
}
