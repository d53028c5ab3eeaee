"""One set of trained weights, evaluated in several precisions beside float64."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jmp
import numpy as np
from matplotlib.figure import Figure

import mpjax
from experiments.harness import plot_style
from experiments.harness.plot_style import decorate
from experiments.harness.results import Column

BATCH_SIZE = 2000
REFERENCE = "float64"
# float8 applies to the weights only; computation is in float16, which holds both.
PRECISIONS: dict[str, jmp.Policy] = {
    **{
        name: mpjax.get_policy(name)
        for name in (REFERENCE, "float32", "bfloat16", "float16")
    },
    **{
        name: jmp.Policy(jnp.dtype(name), jnp.dtype("float16"), jnp.dtype("float16"))
        for name in ("float8_e4m3fn", "float8_e5m2")
    },
}
COLUMNS = (
    Column("trained in", "policy"),
    Column("evaluated in", "precision"),
    Column("accuracy", "test_accuracy", "{:.2%}"),
    Column("changed", "num_changed"),
    Column("logit error", "max_logit_difference", "{:.1e}"),
    Column("margin from", "min_changed_margin", "{:.2g}"),
    Column("to", "max_changed_margin", "{:.2g}"),
    Column("weights, B", "weight_bytes", "{:,}"),
    Column("activations, B", "activation_bytes", "{:,}"),
)


def evaluate(
    model: nn.Module,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray,
    precisions: Sequence[str] = tuple(PRECISIONS),
) -> list[dict[str, Any]]:
    """Evaluates the same weights in each precision.

    `N` denotes the number of images.

    Args:
      model: a Linen module that computes in the dtype of its parameters and input.
      params: parameters of the model.
      images: (N, ...) float32.
      labels: integers (N,).
      precisions: names in `PRECISIONS`; without `float64` there is no comparison.

    Returns:
      A row per precision: `test_accuracy`, `num_correct`, `weight_bytes`,
      `activation_bytes` (outputs of the layers for one image), and compared with
      float64: `num_changed` (images with another prediction), `max_logit_difference`,
      `min_changed_margin` and `max_changed_margin` (float64's margin between the first
      and the second class, over the changed images); None if nothing is compared.
    """
    values = {name: logits(model, params, images, name) for name in precisions}
    rows = []
    for name in precisions:
        num_correct = int(np.sum(values[name].argmax(-1) == labels))
        reference = None if name == REFERENCE else values.get(REFERENCE)
        rows.append(
            {
                "precision": name,
                "test_accuracy": num_correct / len(labels),
                "num_correct": num_correct,
                **_differences(values[name], reference),
                "weight_bytes": weight_bytes(params, name),
                "activation_bytes": activation_bytes(model, params, images, name),
            }
        )
    return rows


def logits(
    model: nn.Module, params: Any, images: np.ndarray, precision: str
) -> np.ndarray:
    """Returns the logits (N, num_classes), computed in a precision, as float64.

    The model runs op by op, so that every intermediate value is rounded: within one
    compiled program XLA may keep half-precision values in float32.
    """
    policy = PRECISIONS[precision]
    parts = []
    with jax.enable_x64(policy.compute_dtype == jnp.float64):
        params = _cast(params, policy)
        for start in range(0, len(images), BATCH_SIZE):
            batch = jnp.asarray(images[start : start + BATCH_SIZE], jnp.float32)
            out: Any = model.apply({"params": params}, policy.cast_to_compute(batch))
            parts.append(np.asarray(policy.cast_to_output(out), np.float64))
    return np.concatenate(parts)


def weight_bytes(params: Any, precision: str) -> int:
    """Returns the bytes of all parameters, stored in a precision."""
    itemsize = jnp.dtype(PRECISIONS[precision].param_dtype).itemsize
    return sum(np.size(leaf) for leaf in jax.tree.leaves(params)) * itemsize


def activation_bytes(
    model: nn.Module, params: Any, images: np.ndarray, precision: str
) -> int:
    """Returns the bytes of all dense and convolution outputs for one image."""
    policy = PRECISIONS[precision]

    def layer_outputs(params, batch):
        _, state = model.apply(
            {"params": _cast(params, policy)},
            policy.cast_to_compute(batch),
            capture_intermediates=lambda module, _: isinstance(
                module, (nn.Conv, nn.Dense)
            ),
            mutable=["intermediates"],
        )
        return state

    with jax.enable_x64(policy.compute_dtype == jnp.float64):
        shapes = jax.eval_shape(layer_outputs, params, images[:1])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def draw(table: dict[str, Any]) -> Figure:
    """Draws accuracy and disagreement per precision, a colour per trained policy.

    Args:
      table: its `runs` are rows of `evaluate`, each with the `policy` that trained the
        weights; it may have a `title`.
    """
    rows = table["runs"]
    figure = plot_style.new_figure(3.7, table.get("title", "DeepConvNet on MNIST"))
    accuracy, changed = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["precision"] for row in rows))
    colors = plot_style.colors(row["policy"] for row in rows)
    width = 0.84 / len(colors)
    for index, (policy, color) in enumerate(colors.items()):
        own = [row for row in rows if row["policy"] == policy]
        offset = (index - (len(colors) - 1) / 2) * width
        places = [names.index(row["precision"]) + offset for row in own]
        shares = [row["test_accuracy"] for row in own]
        accuracy.plot(places, shares, "o", color=color, label=f"trained in {policy}")
        pairs = zip(places, own, strict=True)
        known = [
            (x, r["num_changed"]) for x, r in pairs if r["num_changed"] is not None
        ]
        bars = changed.bar(
            [x for x, _ in known], [y for _, y in known], width, color=color
        )
        changed.bar_label(bars, padding=1, fontsize=plot_style.SMALL)
    num_images = round(rows[0]["num_correct"] / max(rows[0]["test_accuracy"], 1e-9))
    text = "accuracy on the test images"
    decorate(accuracy, text, "evaluated in", "test accuracy")
    text = "predictions that are not float64's"
    decorate(changed, text, "evaluated in", f"images, of {num_images:,}")
    labels = [name.replace("_", "\n") for name in names]
    for axes in (accuracy, changed):
        axes.set_xticks(range(len(names)), labels, fontsize=plot_style.SMALL - 1)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(visible=False, axis="x")
    accuracy.margins(y=0.15)
    plot_style.percent_axis(accuracy.yaxis)
    changed.margins(y=0.1)
    plot_style.count_axis(changed.yaxis)
    plot_style.key_below(figure, *accuracy.get_legend_handles_labels())
    return figure


def _cast(params: Any, policy: jmp.Policy) -> Any:
    """Rounds weights to the policy's parameter dtype, then casts them for compute."""
    return policy.cast_to_compute(
        policy.cast_to_param(jax.tree.map(jnp.asarray, params))
    )


def _differences(values: np.ndarray, reference: np.ndarray | None) -> dict[str, Any]:
    names = ("num_changed", "max_logit_difference")
    names += ("min_changed_margin", "max_changed_margin")
    if reference is None:
        return dict.fromkeys(names)
    second, first = np.sort(reference, axis=-1)[:, -2:].T
    margins = (first - second)[values.argmax(-1) != reference.argmax(-1)]
    ends = (float(margins.min()), float(margins.max())) if margins.size else (None,) * 2
    difference = float(np.abs(values - reference).max())
    return dict(zip(names, (margins.size, difference, *ends), strict=True))
