"""Layers of experts, of which each token goes to two.

Dense dispatch, by one-hot einsums with a capacity, is that of "GShard"
(arXiv:2006.16668); ragged dispatch sorts the tokens by expert, and drops none, as
"MegaBlocks" (arXiv:2211.15841).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

import mpjax

_init = nn.initializers.lecun_normal(batch_axis=0)


class MoE(nn.Module):
    """A router, and experts that are MLPs with GELU.

    Attributes:
      num_experts: number of experts.
      num_hidden: hidden units of an expert.
      top_k: number of experts that a token goes to.
      ragged: whether tokens are sorted by expert; otherwise one-hot einsums.
      capacity_factor: of dense dispatch: slots of an expert, as a multiple of its
        share of the tokens; the tokens beyond are left out.
      dtype: the dtype of the experts; None for float32. The router is float32.
    """

    num_experts: int = 8
    num_hidden: int = 4096
    top_k: int = 2
    ragged: bool = False
    capacity_factor: float = 1.25
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, T, D) for x (B, T, D)."""
        width = x.shape[-1]
        router = self.param(
            "router", nn.initializers.lecun_normal(), (width, self.num_experts)
        )
        shape = (self.num_experts, width, self.num_hidden)
        up = self.param("up", _init, shape)
        down = self.param("down", _init, (shape[0], shape[2], shape[1]))
        route = mpjax.full_precision(functools.partial(_route, top_k=self.top_k))
        gates, experts = route(x, router)
        x, up, down = promote_dtype(x, up, down, dtype=self.dtype)
        if self.ragged:
            return _ragged(x, up, down, gates, experts)
        capacity = int(
            self.capacity_factor * self.top_k * x.shape[1] / self.num_experts
        )
        return _dense(x, up, down, gates, experts, capacity)


class MoETransformer(nn.Module):
    """Layers of experts, each normalized before and added to its input.

    Attributes:
      num_layers: number of layers.
      num_experts: number of experts.
      num_hidden: hidden units of an expert.
      ragged: as in `MoE`.
      dtype: the dtype to compute in; None for float32.
    """

    num_layers: int = 2
    num_experts: int = 8
    num_hidden: int = 4096
    ragged: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, T, D) for x (B, T, D)."""
        x = x.astype(self.dtype or x.dtype)
        for _ in range(self.num_layers):
            y = nn.LayerNorm(dtype=self.dtype)(x)
            experts = MoE(
                self.num_experts,
                self.num_hidden,
                ragged=self.ragged,
                dtype=self.dtype,
            )
            x = x + experts(y)
        return nn.LayerNorm(dtype=self.dtype)(x)


def _route(x: jax.Array, router: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the gates, float32, and the experts, int32, of each token; (B, T, K)."""
    probabilities = jax.nn.softmax(x.astype(jnp.float32) @ router)
    gates, experts = jax.lax.top_k(probabilities, top_k)
    return gates / jnp.sum(gates, axis=-1, keepdims=True), experts


def _dense(x, up, down, gates, experts, capacity):
    """Sends tokens to the slots of experts by products with one-hot arrays."""
    batch, length, top_k = experts.shape
    num_experts = len(up)
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32)  # (B, T, K, E)
    # The first choices of all tokens take their slots before the second choices.
    in_order = chosen.swapaxes(1, 2).reshape(batch, top_k * length, num_experts)
    before = jnp.cumsum(in_order, axis=1) - in_order
    before = before.reshape(batch, top_k, length, num_experts).swapaxes(1, 2)
    slot = jnp.sum(before * chosen, axis=-1)
    # A slot beyond the capacity is all zeros.
    slots = jax.nn.one_hot(slot, capacity, dtype=x.dtype)  # (B, T, K, C)
    combine = jnp.einsum(
        "btk,btke,btkc->btec", gates.astype(x.dtype), chosen.astype(x.dtype), slots
    )
    dispatch = (combine > 0).astype(x.dtype)
    y = jnp.einsum("btd,btec->becd", x, dispatch)
    y = nn.gelu(jnp.einsum("becd,edf->becf", y, up))
    y = jnp.einsum("becf,efd->becd", y, down)
    return jnp.einsum("becd,btec->btd", y, combine)


def _ragged(x, up, down, gates, experts):
    """Sorts the tokens by expert, and multiplies the groups by their weights."""
    top_k = experts.shape[-1]
    width = x.shape[-1]
    order = jnp.argsort(experts.reshape(-1))
    group_sizes = jnp.bincount(experts.reshape(-1), length=len(up))
    y = x.reshape(-1, width)[order // top_k]
    y = nn.gelu(jax.lax.ragged_dot(y, up, group_sizes))
    y = jax.lax.ragged_dot(y, down, group_sizes)
    y = y[jnp.argsort(order)].reshape(*experts.shape, width)
    return jnp.einsum("btkd,btk->btd", y, gates.astype(x.dtype))
