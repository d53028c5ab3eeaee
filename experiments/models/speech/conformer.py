"""Conformer blocks for padded sequences.

"Conformer: Convolution-augmented Transformer for Speech Recognition",
arXiv:2005.08100, with two differences. Positions are rotary, not relative encodings:
as much is known of distances, without parameters and a second matmul of queries. The
convolution module has LayerNorm where the paper has BatchNorm: it looks at one frame at
a time, so that neither padding nor the sizes of batch and microbatch can matter, and
training and evaluation compute the same.

B denotes the batch size, T time, D features, H heads.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.llama import rotate
from experiments.models.speech.padding import frame_mask, zero_padding
from experiments.models.speech.row_conv import depthwise_conv


class ConformerBlock(nn.Module):
    """Half a feed-forward, self-attention, convolution, half a feed-forward.

    Attributes:
      num_heads: heads of the attention; divides D, with an even quotient.
      kernel_size: taps of the depthwise convolution; odd, half of them ahead.
      expansion: hidden units of a feed-forward module, in multiples of D.
      dropout_rate: share of each module's outputs that are dropped.
    """

    num_heads: int = 4
    kernel_size: int = 15
    expansion: int = 4
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, num_frames: jax.Array, *, train: bool
    ) -> jax.Array:
        """Returns (B, T, D) for x (B, T, D), with zeros behind each end.

        Args:
          x: activations.
          num_frames: frames of each utterance, int32 (B,).
          train: whether to drop out, by the key "dropout".

        Raises:
          ValueError: if D cannot be split into heads of an even number of units.
        """

        def drop(x):
            return nn.Dropout(self.dropout_rate, deterministic=not train)(x)

        if x.shape[-1] % (2 * self.num_heads):
            raise ValueError(
                f"the {x.shape[-1]} units must be a multiple of 2 * num_heads = "
                f"{2 * self.num_heads}: choose another num_units or num_heads"
            )
        x = x + drop(self._feed_forward(x, "feed_forward_1")) / 2
        x = x + drop(self._attend(x, num_frames))
        x = x + drop(self._convolve(x, num_frames))
        x = x + drop(self._feed_forward(x, "feed_forward_2")) / 2
        return zero_padding(nn.LayerNorm(name="norm")(x), num_frames)

    def _feed_forward(self, x: jax.Array, name: str) -> jax.Array:
        num_units = x.shape[-1]
        x = nn.LayerNorm(name=f"{name}_norm")(x)
        x = nn.silu(nn.Dense(self.expansion * num_units, name=f"{name}_up")(x))
        return nn.Dense(num_units, name=f"{name}_down")(x)

    def _attend(self, x: jax.Array, num_frames: jax.Array) -> jax.Array:
        num_units = x.shape[-1]
        depth = num_units // self.num_heads
        x = nn.LayerNorm(name="attention_norm")(x)

        def heads(name):
            return nn.DenseGeneral((self.num_heads, depth), name=name)(x)

        query, key = rotate(heads("query")), rotate(heads("key"))
        logits = jnp.einsum("bthd,bshd->bhts", query, key) * depth**-0.5
        mask = frame_mask(num_frames, x.shape[1])[:, None, None]
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        # Large enough that its exponential is exactly 0 beside any real logit, and
        # finite in float16.
        weights = nn.softmax(jnp.where(mask, logits, -3e4)).astype(x.dtype)
        attended = jnp.einsum("bhts,bshd->bthd", weights, heads("value"))
        return nn.DenseGeneral(num_units, axis=(-2, -1), name="out")(attended)

    def _convolve(self, x: jax.Array, num_frames: jax.Array) -> jax.Array:
        num_units = x.shape[-1]
        x = nn.LayerNorm(name="conv_norm")(x)
        x = nn.glu(nn.Dense(2 * num_units, name="conv_in")(x))
        kernel = self.param(
            "conv_kernel",
            nn.initializers.normal(self.kernel_size**-0.5),
            (self.kernel_size, num_units),
        )
        before = self.kernel_size // 2
        x = depthwise_conv(zero_padding(x, num_frames), kernel, before)
        x = nn.silu(nn.LayerNorm(name="conv_mid_norm")(x))
        return nn.Dense(num_units, name="conv_out")(x)
