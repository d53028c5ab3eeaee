"""Max pooling by `jnp.maximum` of slices.

With jax 0.12 on CPU a compiled bfloat16 forward pass over a reduction, such as
`nn.max_pool`, fuses convolutions, pools and matmul into one, and gives NaN.
"""

import jax
import jax.numpy as jnp


def max_pool(x: jax.Array, *, ceil: bool = False) -> jax.Array:
    """Returns the largest of each 2 x 2 of images (B, H, W, C).

    Args:
      x: the images.
      ceil: whether an odd last row or column is pooled by itself; otherwise it is left
        out.
    """
    if ceil:
        odd = [(0, size % 2) for size in x.shape[1:3]]
        x = jnp.pad(x, ((0, 0), *odd, (0, 0)), mode="edge")
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    top, bottom = x[:, ::2], x[:, 1::2]
    rows = jnp.maximum(top, bottom)
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def max_filter(x: jax.Array) -> jax.Array:
    """Returns the largest of the 3 x 3 about each pixel of images (B, H, W, C)."""
    for axis in (1, 2):
        padding = [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)]
        padded = jnp.pad(x, padding, mode="edge")
        size = x.shape[axis]
        slices = (
            jax.lax.slice_in_dim(padded, start, start + size, axis=axis)
            for start in range(3)
        )
        first, middle, last = slices
        x = jnp.maximum(jnp.maximum(first, middle), last)
    return x
