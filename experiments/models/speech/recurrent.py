"""GRU and LSTM layers for padded sequences.

The inputs of all steps, gates and directions are projected by one matmul, before one
scan in which both directions run side by side, with one batched matmul a step. The
weights' gradient is one matmul after the backward scan, where differentiating the scan
would accumulate it step by step. The cells are those of `flax.linen.GRUCell` and
`LSTMCell`, with as many parameters of the same meaning.

B denotes the batch size, T time, D features, N directions, G gates, H units.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

import mpjax
from experiments.models.speech.padding import frame_mask, zero_padding

Arrays = tuple[jax.Array, ...]


class Cell(NamedTuple):
    """What follows the matmuls in one step of a recurrent network.

    Attributes:
      num_gates: gates, each with H columns of the kernels.
      num_summed: gates, the first ones, of which only the sum of both parts matters:
        the parts have one gradient, which is stored once.
      num_states: arrays of the state; the first is the output.
      update: `(state, projected, recurrent) -> state`, where projected and recurrent
        are tuples with an array (N, B, H) for each gate: the projected input, and the
        last output times the recurrent kernel. Elementwise.
    """

    num_gates: int
    num_summed: int
    num_states: int
    update: Callable[[Arrays, Arrays, Arrays], Arrays]


def _update_gru(state: Arrays, projected: Arrays, recurrent: Arrays) -> Arrays:
    (h,) = state
    reset = nn.sigmoid(projected[0] + recurrent[0])
    keep = nn.sigmoid(projected[1] + recurrent[1])
    new = nn.tanh(projected[2] + reset * recurrent[2])
    return ((1 - keep) * new + keep * h,)


def _update_lstm(state: Arrays, projected: Arrays, recurrent: Arrays) -> Arrays:
    _, c = state
    sums = [a + b for a, b in zip(projected, recurrent, strict=True)]
    into, forget, new, out = sums
    c = nn.sigmoid(forget) * c + nn.sigmoid(into) * nn.tanh(new)
    return nn.sigmoid(out) * nn.tanh(c), c


# The gates are float32 under autocast, also where the backward pass computes
# them again from what was saved in half.
CELLS = {
    "gru": Cell(3, 2, 1, mpjax.full_precision(_update_gru)),
    "lstm": Cell(4, 4, 2, mpjax.full_precision(_update_lstm)),
}


class Recurrence(nn.Module):
    """A GRU or LSTM over padded sequences, in one direction or in both.

    The backward direction starts at each sequence's own end. Outputs behind the end
    are zero. Differentiable in reverse mode only.

    Parameters: `kernel` (D, N * G * H) and `bias` (N * G * H,) of the inputs, by
    direction, then gate (GRU: r, z, n; LSTM: i, f, g, o); `recurrent_kernel`
    (N, H, G * H); and for the GRU `recurrent_bias` (N, H) of the gate n.

    Attributes:
      num_units: units of each direction.
      cell: "gru" or "lstm".
      bidirectional: whether there is a second direction, backward in time.
      unroll: steps in one iteration of the compiled loop. More than 1 was no faster,
        and compiled longer, on a CPU.
    """

    num_units: int
    cell: Literal["gru", "lstm"] = "gru"
    bidirectional: bool = True
    unroll: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, num_frames: jax.Array) -> jax.Array:
        """Returns (B, T, N * H) for x (B, T, D) and num_frames int32 (B,).

        Raises:
          ValueError: if `cell` is not a cell's name.
        """
        if self.cell not in CELLS:
            raise ValueError(f'cell must be "gru" or "lstm", got {self.cell!r}')
        num_units, num_directions = self.num_units, 1 + self.bidirectional
        num_gates = CELLS[self.cell].num_gates
        num_columns = num_directions * num_gates * num_units
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (x.shape[-1], num_columns)
        )
        bias = self.param("bias", nn.initializers.zeros, (num_columns,))
        shape = (num_directions, num_units, num_gates * num_units)
        recurrent_kernel = self.param("recurrent_kernel", _orthogonal_gates, shape)
        bias_n = None
        if self.cell == "gru":
            shape = (num_directions, num_units)
            bias_n = self.param("recurrent_bias", nn.initializers.zeros, shape)

        projected = jnp.swapaxes(x, 0, 1) @ kernel
        # An array for each gate: XLA:CPU does not vectorize over slices of one.
        columns = jnp.split(projected, num_directions * num_gates, axis=-1)
        gates = tuple(_side_by_side(columns[g::num_gates]) for g in range(num_gates))
        biases = tuple(jnp.swapaxes(bias.reshape(num_directions, num_gates, -1), 0, 1))
        mask = frame_mask(num_frames, x.shape[1]).T[..., None]
        masks = _side_by_side([mask] * num_directions)
        outputs = _run(
            self.cell, self.unroll, gates, biases, recurrent_kernel, bias_n, masks
        )
        directions = [outputs[:, 0]]
        if self.bidirectional:
            directions.append(outputs[::-1, 1])
        merged = jnp.swapaxes(jnp.concatenate(directions, axis=-1), 0, 1)
        return zero_padding(merged, num_frames)


def _side_by_side(directions: list[jax.Array]) -> jax.Array:
    """Stacks (T, B, ...) of each direction on axis 1, the second one reversed in time.

    Reversed so, a padded sequence begins with its padding, in which the state stays
    as it begins: zero. So its backward direction starts at its own end.
    """
    forward, *backward = directions
    return jnp.stack([forward, *(x[::-1] for x in backward)], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(
    cell: str,
    unroll: int,
    projected: Arrays,
    bias: Arrays,
    kernel: jax.Array,
    bias_n: jax.Array | None,
    mask: jax.Array,
) -> jax.Array:
    """Returns the outputs (T, N, B, H) of all steps.

    Args:
      cell: the cell's name.
      unroll: steps in one iteration of the loop.
      projected: the projected inputs (T, N, B, H), an array for each gate.
      bias: added to them (N, H), one for each gate. That is done in every step: with
        it before, autocast would have them in float32, twice the memory.
      kernel: the recurrent kernel (N, H, G * H).
      bias_n: added to the last gate's recurrent part, (N, H), or None.
      mask: bool (T, N, B, 1), False where the state stays as it is.
    """
    states, _ = _forward_scan(cell, unroll, projected, bias, kernel, bias_n, mask)
    return states[0]


def _forward_scan(
    cell: str,
    unroll: int,
    projected: Arrays,
    bias: Arrays,
    kernel: Any,
    bias_n: Any,
    mask: Any,
) -> tuple[Arrays, Arrays]:
    """Returns the states after all steps, and the gates' recurrent parts."""
    num_states, update = CELLS[cell].num_states, CELLS[cell].update

    def step(state, inputs):
        projected, mask = inputs
        sums = jnp.einsum("nbh,nhk->nbk", state[0], kernel)
        recurrent = jnp.split(sums, len(projected), axis=-1)
        if bias_n is not None:
            recurrent[-1] += bias_n[:, None]
        new = update(state, _add(projected, bias), tuple(recurrent))
        state = tuple(jnp.where(mask, a, b) for a, b in zip(new, state, strict=True))
        return state, (state, tuple(recurrent))

    zeros = jnp.zeros_like(projected[0][0])
    _, stacks = lax.scan(step, (zeros,) * num_states, (projected, mask), unroll=unroll)
    return stacks


def _add(projected: Arrays, bias: Arrays) -> Arrays:
    """Adds (N, H) to (N, B, H) for each gate."""
    return tuple(x + b[:, None] for x, b in zip(projected, bias, strict=True))


def _run_forward(cell, unroll, projected, bias, kernel, bias_n, mask):
    states, recurrent = _forward_scan(
        cell, unroll, projected, bias, kernel, bias_n, mask
    )
    return states[0], (states, recurrent, projected, bias, kernel, bias_n, mask)


def _run_backward(cell, unroll, residuals, d_outputs):
    states, recurrent, projected, bias, kernel, bias_n, mask = residuals
    before = tuple(jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]) for x in states)
    transposed = jnp.swapaxes(kernel, 1, 2)
    num_summed, update = CELLS[cell].num_summed, CELLS[cell].update

    def step(d_state, inputs):
        d_output, before, projected, recurrent, mask = inputs
        d_state = (d_state[0] + d_output, *d_state[1:])
        # The gates are computed again, not saved: elementwise work is cheap.
        _, pull_back = jax.vjp(update, before, _add(projected, bias), recurrent)
        d_new = tuple(jnp.where(mask, d, 0) for d in d_state)
        d_before, d_projected, d_recurrent = pull_back(d_new)
        d_sums = jnp.concatenate(d_recurrent, axis=-1)
        d_before = tuple(
            jnp.where(mask, a, b) for a, b in zip(d_before, d_state, strict=True)
        )
        d_h = d_before[0] + jnp.einsum("nbk,nkh->nbh", d_sums, transposed)
        return (d_h, *d_before[1:]), (d_projected, d_recurrent[num_summed:])

    _, (d_projected, d_rest) = lax.scan(
        step,
        tuple(jnp.zeros_like(x[0]) for x in states),
        (d_outputs, before, projected, recurrent, mask),
        reverse=True,
        unroll=unroll,
    )
    d_recurrent = (*d_projected[:num_summed], *d_rest)
    d_kernel = jnp.concatenate(
        [jnp.einsum("tnbh,tnbk->nhk", before[0], d) for d in d_recurrent], axis=-1
    )
    d_bias = tuple(jnp.sum(d, axis=(0, 2)) for d in d_projected)
    d_bias_n = None if bias_n is None else jnp.sum(d_recurrent[-1], axis=(0, 2))
    return d_projected, d_bias, d_kernel, d_bias_n, None


_run.defvjp(_run_forward, _run_backward)


def _orthogonal_gates(
    key: jax.Array, shape: tuple[int, int, int], dtype: Any = jnp.float32
) -> jax.Array:
    """Initializes (N, H, G * H): an orthogonal matrix for each direction and gate."""
    num_directions, num_units, num_columns = shape
    num_gates = num_columns // num_units
    keys = jax.random.split(key, num_directions * num_gates)
    # One program for all of them, not one for each.
    init = lambda key: nn.initializers.orthogonal()(key, (num_units, num_units), dtype)
    matrices = jax.vmap(init)(keys)
    gates = matrices.reshape(num_directions, num_gates, num_units, num_units)
    return jnp.swapaxes(gates, 1, 2).reshape(shape)
