"""Times of a convolution in float32, in bfloat16, and as a bfloat16 matmul.

    python -m experiments.benchmarks.convolutions      # 2 minutes on 2 CPU cores

A 3x3 convolution of stride 1, channels last, and the gradients of its images and of
its kernel. As a matmul it multiplies a copy of the images in which each pixel has its
nine neighbours' channels, which takes nine times their memory. Interleaved: one round
times everything once, in a shuffled order; ratios are medians over rounds of the ratio
within a round. "Computed in" is the dtype of the operands in the compiled program.
"""

from experiments.configs.convolutions import Config
from experiments.harness import cli

if __name__ == "__main__":  # before what is slow to import
    cli.run_module("experiments.benchmarks.convolutions", Config, doc=__doc__)

import functools
import re
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks._timing import median_ratio, time_rounds
from experiments.harness import results
from experiments.harness.output import RESULTS, save_table
from experiments.harness.results import Column

NAME = "convolutions"
FLOAT32, BFLOAT16, MATMUL = "float32", "bfloat16", "bfloat16, as a matmul"
COLUMNS = (
    Column("channels", "num_channels"),
    Column("what", "what"),
    Column("written in", "form"),
    Column("computed in", "computed_in"),
    Column("ms", "ms", "{:.2f}"),
    Column("times float32's", "ratio", "{:.2f}"),
)


def main(config: Config) -> dict[str, Any]:
    """Times every form at every number of channels; writes the table.

    Returns:
      What the result file holds; its `runs` have the keys of `COLUMNS`.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    environment = results.environment()
    runs = []
    for num_channels in config.num_channels:
        operands = _operands(config, num_channels)
        fns, dtypes = {}, {}
        for key, fn in FORMS.items():
            dtype = jnp.float32 if key[1] == FLOAT32 else jnp.bfloat16
            args = [x.astype(dtype) for x in operands[key[0]]]
            compiled = jax.jit(fn).lower(*args).compile()
            dtypes[key] = operand_dtype(compiled.as_text() or "")
            run = lambda fn, args: jax.block_until_ready(fn(*args))
            fns[key] = functools.partial(run, compiled, args)
            fns[key]()
        times_ms = time_rounds(fns, config.num_rounds, seed=config.seed)
        for (what, form), times in times_ms.items():
            row = {
                "num_channels": num_channels,
                "what": what,
                "form": form,
                "computed_in": dtypes[what, form],
                "ms": statistics.median(times),
                "ratio": median_ratio(times, times_ms[what, FLOAT32]),
                "times_ms": [round(t, 3) for t in times],
            }
            runs.append(row)
    table = {
        "experiment": NAME,
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "num_rounds": config.num_rounds,
        "seed": config.seed,
        "environment": environment,
        "runs": runs,
    }
    file = f"{NAME}_{environment['machine']}_jax{jax.__version__}.json"
    size = config.image_size
    title = f"3x3 convolution, {config.batch_size} images of {size} x {size}"
    save_table(config.output or RESULTS / file, table, title, COLUMNS)
    return table


def operand_dtype(text: str) -> str:
    """Returns the dtype in which a compiled program takes its product.

    Args:
      text: the program, of one convolution or one matmul.
    """
    call = re.search(r" (?:convolution|dot)\(.*?%([\w.-]+)", text)
    if call is None:
        raise ValueError(f"no convolution and no matmul in\n{text}")
    shape = re.search(rf"%{re.escape(call[1])} = (\w+)\[", text)
    return str(shape and shape[1])


def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns (B, H, W, D) for images (B, H, W, C) and a kernel (3, 3, C, D)."""
    return _convolution(x, w, ("NHWC", "HWIO", "NHWC"))


def images_gradient(g: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the gradient of `convolve` for its images, from the result's (g)."""
    return _convolution(g, jnp.flip(w, (0, 1)), ("NHWC", "HWOI", "NHWC"))


def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """Returns the gradient of `convolve` for its kernel, from the result's (g)."""
    return _convolution(x, g, ("CHWN", "IHWO", "HWNC"))


def convolve_as_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns what `convolve` does."""
    num_in, num_out = w.shape[2:]
    patches = jnp.concatenate(_shifted(x), axis=-1)
    product = patches.reshape(-1, 9 * num_in) @ w.reshape(9 * num_in, num_out)
    return product.reshape(*x.shape[:-1], num_out)


def images_gradient_as_matmul(g: jax.Array, w: jax.Array) -> jax.Array:
    """Returns what `images_gradient` does."""
    return convolve_as_matmul(g, jnp.swapaxes(jnp.flip(w, (0, 1)), 2, 3))


def kernel_gradient_as_matmul(x: jax.Array, g: jax.Array) -> jax.Array:
    """Returns what `kernel_gradient` does."""
    num_in, num_out = x.shape[-1], g.shape[-1]
    shifted = [jnp.moveaxis(s, -1, 0).reshape(num_in, -1) for s in _shifted(x)]
    # Joined into one array first, of which the matmul then reads rows.
    patches = lax.optimization_barrier(jnp.concatenate(shifted))
    return (patches @ g.reshape(-1, num_out)).reshape(3, 3, num_in, num_out)


def _shifted(x: jax.Array) -> list[jax.Array]:
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]


def _convolution(x: jax.Array, w: jax.Array, layout: tuple[str, str, str]) -> jax.Array:
    padding = ((1, 1), (1, 1))
    return lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=layout)


def _operands(config: Config, num_channels: int) -> dict[str, tuple[jax.Array, ...]]:
    generator = np.random.default_rng(config.seed)
    normal = lambda *shape: jnp.asarray(generator.standard_normal(shape, np.float32))
    image = (config.batch_size, config.image_size, config.image_size, num_channels)
    x, g = normal(*image), normal(*image)
    w = normal(3, 3, num_channels, num_channels)
    return {"forward": (x, w), "images' gradient": (g, w), "kernel's gradient": (x, g)}


FORMS: dict[tuple[str, str], Callable[..., jax.Array]] = {
    ("forward", FLOAT32): convolve,
    ("forward", BFLOAT16): convolve,
    ("forward", MATMUL): convolve_as_matmul,
    ("images' gradient", FLOAT32): images_gradient,
    ("images' gradient", BFLOAT16): images_gradient,
    ("images' gradient", MATMUL): images_gradient_as_matmul,
    ("kernel's gradient", FLOAT32): kernel_gradient,
    ("kernel's gradient", BFLOAT16): kernel_gradient,
    ("kernel's gradient", MATMUL): kernel_gradient_as_matmul,
}
