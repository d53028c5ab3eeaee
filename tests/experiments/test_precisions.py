"""The evaluation is what NumPy computes; float8 is ml_dtypes'; x64 is off again."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from experiments.harness import precisions
from experiments.models.deep_convnet import DeepConvNet

pytestmark = pytest.mark.weekly

HALVES = ("bfloat16", "float16")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


@pytest.fixture(scope="module")
def network():
    """The model, parameters with biases, images and labels that it mostly gets."""
    model = DeepConvNet()
    images = np.random.default_rng(0).random((40, 28, 28)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    leaves, tree = jax.tree.flatten(jax.device_get(params))
    rng = np.random.default_rng(1)
    leaves = [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    params = jax.tree.unflatten(tree, leaves)
    labels = numpy_logits(params, images).argmax(-1)
    labels[::8] += 1
    return model, params, images, labels


@pytest.fixture(scope="module")
def rows(network):
    return {row["precision"]: row for row in precisions.evaluate(*network)}


def test_float64_is_numpys(network):
    model, params, images, _ = network
    values = precisions.logits(model, params, images, "float64")
    expected = numpy_logits(params, images)
    np.testing.assert_allclose(
        values, expected, rtol=0, atol=1e-12 * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("precision", "epsilon"),
    [
        ("float16", 2**-10),
        pytest.param("float32", 2**-23, marks=pytest.mark.slow),
        pytest.param("bfloat16", 2**-7, marks=pytest.mark.slow),
    ],
)
def test_other_precisions_are_as_far_from_it_as_they_round(network, precision, epsilon):
    model, params, images, _ = network
    expected = numpy_logits(params, images)
    values = precisions.logits(model, params, images, precision)
    error = np.abs(values - expected).max() / np.abs(expected).max()
    assert epsilon / 100 < error < 16 * epsilon


@pytest.mark.parametrize("precision", HALVES)
def test_compiled_half_is_right_too(network, precision):
    model, params, images, _ = network
    expected = numpy_logits(params, images)
    half = precisions.PRECISIONS[precision].cast_to_compute((params, images))
    values = jax.jit(lambda params, x: model.apply({"params": params}, x))(*half)
    error = np.abs(np.asarray(values, np.float64) - expected).max()
    assert error < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("precision", FLOAT8)
def test_float8_weights_are_those_of_ml_dtypes_in_float16(network, precision):
    model, params, images, _ = network
    dtype = getattr(ml_dtypes, precision)
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
    np.testing.assert_array_equal(
        precisions.logits(model, params, images, precision),
        precisions.logits(model, rounded, images, "float16"),
    )


@pytest.mark.parametrize("precision", FLOAT8)
def test_the_cast_to_float8_is_ml_dtypes_over_its_whole_range(precision):
    rng = np.random.default_rng(0)
    values = rng.normal(size=20_000) * 10 ** rng.uniform(-8, 2, 20_000)
    values = values.astype(np.float32)
    cast = precisions.PRECISIONS[precision].cast_to_param(jnp.asarray(values))
    expected = values.astype(getattr(ml_dtypes, precision))
    np.testing.assert_array_equal(
        np.asarray(cast).view(np.uint8), expected.view(np.uint8)
    )


def test_x64_is_on_in_the_evaluation_alone(network, monkeypatch):
    model, params, images, _ = network
    seen = {}
    apply = DeepConvNet.apply

    def spy(self, variables, x, **kwargs):
        seen[x.dtype.name] = jax.config.values["jax_enable_x64"]
        return apply(self, variables, x, **kwargs)

    monkeypatch.setattr(DeepConvNet, "apply", spy)
    for precision in ("float64", "float32", "float16"):
        precisions.logits(model, params, images, precision)
        assert jnp.zeros(1).dtype == jnp.float32
    assert seen.pop("float64") is True
    assert seen == {"float32": False, "float16": False}
    monkeypatch.setattr(DeepConvNet, "apply", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        precisions.logits(model, params, images, "float64")
    assert jnp.zeros(1).dtype == jnp.float32


def test_accuracy_and_changes_are_those_of_the_logits(network, rows):
    model, params, images, labels = network
    reference = numpy_logits(params, images)
    assert rows["float64"]["num_correct"] == 35
    assert rows["float64"]["test_accuracy"] == 35 / 40
    assert rows["float64"]["num_changed"] is None
    for precision in ("float32", *HALVES, *FLOAT8):
        values, row = (
            precisions.logits(model, params, images, precision),
            rows[precision],
        )
        changed = values.argmax(-1) != reference.argmax(-1)
        assert row["num_correct"] == (values.argmax(-1) == labels).sum()
        assert row["num_changed"] == changed.sum()
        difference = np.abs(values - reference).max()
        np.testing.assert_allclose(row["max_logit_difference"], difference, rtol=1e-3)
        ordered = np.sort(reference[changed], axis=-1)
        margins = ordered[:, -1] - ordered[:, -2]
        expected = (margins.min(), margins.max()) if changed.any() else (None, None)
        got = row["min_changed_margin"], row["max_changed_margin"]
        assert got == pytest.approx(expected) if changed.any() else got == expected


def test_bytes_are_those_of_the_formats(rows):
    # Six convolutions, 28 x 28 to 8 x 8 pixels, and two dense layers.
    num_outputs = 2 * 784 * 16 + 196 * 32 + 256 * 32 + 2 * 64 * 64 + 50 + 10
    sizes = {
        "float64": (8, 8),
        "float32": (4, 4),
        "bfloat16": (2, 2),
        "float16": (2, 2),
    }
    for precision, row in rows.items():
        weight, activation = sizes.get(precision, (1, 2))
        assert row["weight_bytes"] == 123_552 * weight
        assert row["activation_bytes"] == num_outputs * activation


def test_many_images_are_evaluated_in_batches(network, monkeypatch):
    model, params, images, _ = network
    whole = precisions.logits(model, params, images, "float32")
    monkeypatch.setattr(precisions, "BATCH_SIZE", 20)
    parts = precisions.logits(model, params, images, "float32")
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-4 * np.abs(whole).max())


def numpy_logits(params, images):
    """The network by loops over the nine taps, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = images.astype(np.float64).reshape(-1, 28, 28, 1)
    for index, padding in enumerate((1, 1, 1, 2, 1, 1)):
        layer = params[f"Conv_{index}"]
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        height, width = x.shape[1] - 2, x.shape[2] - 2
        x = layer["bias"] + sum(
            x[:, i : i + height, j : j + width] @ layer["kernel"][i, j]
            for i in range(3)
            for j in range(3)
        )
        x = np.maximum(x, 0)
        if index % 2:
            corners = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
            x = np.max(corners, axis=0)
    x = x.reshape(len(x), -1)
    hidden, last = params["Dense_0"], params["Dense_1"]
    x = np.maximum(x @ hidden["kernel"] + hidden["bias"], 0)
    return x @ last["kernel"] + last["bias"]
