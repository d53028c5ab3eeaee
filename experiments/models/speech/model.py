"""Acoustic models like Deep Speech 2, arXiv:1512.02595, for padded batches.

B denotes the batch size, T frames, T' output frames, F mel bands.
"""

from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.configs.recognizer import Encoder
from experiments.models.speech.conformer import ConformerBlock
from experiments.models.speech.padding import MaskedBatchNorm, zero_padding
from experiments.models.speech.recurrent import Recurrence
from experiments.models.speech.row_conv import RowConv

# What clips the relu after a convolution, as in the paper.
MAX_ACTIVATION = 20.0


class SpeechModel(nn.Module):
    """Convolutions over time and frequency, an encoder, and a Dense layer to classes.

    Frames behind an utterance's end have no effect on its outputs, nor on the
    statistics of BatchNorm, which are the model state: an utterance gives the same
    logits alone and in any padded batch. BatchNorm precedes each recurrent layer but
    the first, which follows one.

    The defaults are small, for a CPU. About 50 million parameters has
    `SpeechModel(num_classes, num_channels=32, num_units=896, num_layers=4)`.

    Attributes:
      num_classes: classes, of which 0 is the blank of CTC.
      encoder: "bigru" or "bilstm", both directions side by side; "gru_lookahead",
        forward in time and a row convolution after the last layer; or "conformer".
      num_channels: channels of the two convolutions.
      num_units: units of each direction of a recurrent layer; of a frame in a
        Conformer.
      num_layers: recurrent layers, or Conformer blocks.
      subsampling: frames for each output frame, 2 or 4.
      kernel_sizes: frames and mel bands that each convolution sees.
      lookahead: output frames that "gru_lookahead" sees ahead.
      num_heads: heads of a Conformer's attention.
      conv_size: taps of a Conformer's depthwise convolution.
      dropout_rate: share of the inputs of recurrent layers but the first, and of the
        outputs of a Conformer's modules, that are dropped in training.
      unroll: steps of a recurrence in one iteration of the compiled loop.
    """

    num_classes: int
    encoder: Encoder = "bigru"
    num_channels: int = 8
    num_units: int = 96
    num_layers: int = 2
    subsampling: int = 2
    kernel_sizes: tuple[tuple[int, int], tuple[int, int]] = ((11, 5), (5, 5))
    lookahead: int = 20
    num_heads: int = 4
    conv_size: int = 15
    dropout_rate: float = 0.0
    unroll: int = 1

    @nn.compact
    def __call__(
        self, features: jax.Array, num_frames: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Returns logits (B, T', num_classes) and output frames int32 (B,).

        An utterance of n frames has n / subsampling outputs, rounded up.

        Args:
          features: log-mel energies (B, T, F).
          num_frames: frames of each utterance, int32 (B,); 0 for a row of padding.
          train: whether BatchNorm uses the statistics of the batch, and to drop out,
            by the key "dropout".

        Raises:
          ValueError: if `encoder` or `subsampling` is none of those above.
        """
        if self.encoder not in get_args(Encoder):
            names = ", ".join(get_args(Encoder))
            raise ValueError(f"encoder must be one of {names}, got {self.encoder!r}")
        if self.subsampling not in (2, 4):
            raise ValueError(f"subsampling must be 2 or 4, got {self.subsampling}")
        x, num_frames = self._convolve(features, num_frames, train)
        if self.encoder == "conformer":
            x = self._conform(x, num_frames, train)
        else:
            x = self._recur(x, num_frames, train)
        return nn.Dense(self.num_classes, name="classes")(x), num_frames

    def _convolve(self, features, num_frames, train):
        """Returns (B, T', D) and T' of each utterance, after two convolutions."""
        x = zero_padding(features, num_frames)[..., None]
        strides = (2, self.subsampling // 2)
        for i, (size, stride) in enumerate(
            zip(self.kernel_sizes, strides, strict=True), start=1
        ):
            # "SAME" would pad by the length of the batch, not of the utterance.
            padding = [((k - 1) // 2, k // 2) for k in size]
            x = nn.Conv(
                self.num_channels,
                size,
                (stride, 2),
                padding,
                use_bias=False,
                name=f"conv_{i}",
            )(x)
            num_frames = -(-num_frames // stride)
            x = zero_padding(x, num_frames)
            x = MaskedBatchNorm(name=f"conv_norm_{i}")(x, num_frames, train=train)
            x = zero_padding(jnp.clip(x, 0, MAX_ACTIVATION), num_frames)
        return x.reshape(*x.shape[:2], -1), num_frames

    def _recur(self, x, num_frames, train):
        cell = "lstm" if self.encoder == "bilstm" else "gru"
        bidirectional = self.encoder != "gru_lookahead"
        for i in range(1, self.num_layers + 1):
            if i > 1:
                name = f"recurrent_norm_{i}"
                x = MaskedBatchNorm(name=name)(x, num_frames, train=train)
                x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            x = Recurrence(
                self.num_units, cell, bidirectional, self.unroll, name=f"recurrent_{i}"
            )(x, num_frames)
        if self.encoder == "gru_lookahead":
            x = RowConv(self.lookahead, name="lookahead")(x, num_frames)
        return x

    def _conform(self, x, num_frames, train):
        x = zero_padding(nn.Dense(self.num_units, name="conformer_in")(x), num_frames)
        for i in range(1, self.num_layers + 1):
            x = ConformerBlock(
                self.num_heads,
                self.conv_size,
                dropout_rate=self.dropout_rate,
                name=f"conformer_{i}",
            )(x, num_frames, train=train)
        return x
