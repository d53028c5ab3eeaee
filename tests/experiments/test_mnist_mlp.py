"""The network, optimizer, loss and split are those of the Keras guide."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cli_runs

import mpjax
from experiments import mnist_mlp
from experiments.data.on_device import DeviceDataset
from experiments.data.splits import split
from experiments.harness.errors import ConfigError
from experiments.models import classification
from experiments.models.mlp import MLP
from experiments.models.optimizers import rmsprop

# Keras itself warns of what numpy and jax are about to remove.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:keras")


@pytest.fixture(scope="module")
def keras():
    return pytest.importorskip("keras")


def make_state(num_units=16, policy="float32", seed=0, dataset=None):
    model = MLP(num_units=(num_units, num_units))
    tx = mpjax.with_loss_scale(rmsprop(1e-3), mpjax.NoOpLossScale())
    config = mnist_mlp.Config(num_units=num_units)
    splits = mnist_mlp.make_splits(config, dataset or cli_runs.images())
    task = mnist_mlp.make_task(config, policy, splits)
    return model, tx, task.make_state(tx, policy, seed)


def test_parameters_are_those_of_784_u_u_10():
    data = cli_runs.images()
    flat = np.zeros((3, 28, 28), np.uint8)
    data = type(data)("zeros", "the tests", flat, np.zeros(3, np.uint8), flat, flat)
    _, _, state = make_state(num_units=32, dataset=data)
    shapes = {k: v.shape for k, v in mpjax_paths(state.params).items()}
    assert shapes == {
        "Dense_0/kernel": (784, 32),
        "Dense_0/bias": (32,),
        "Dense_1/kernel": (32, 32),
        "Dense_1/bias": (32,),
        "Dense_2/kernel": (32, 10),
        "Dense_2/bias": (10,),
    }


def test_the_guides_network_has_as_many_parameters_as_keras_says():
    shapes = jax.eval_shape(MLP().init, jax.random.key(0), jnp.zeros((1, 784)))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count == 784 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 10 + 10


def test_weights_are_glorot_uniform_within_kerass_limits_and_biases_zero(keras):
    _, _, state = make_state(num_units=256)
    for name, value in mpjax_paths(state.params).items():
        if name.endswith("bias"):
            assert not np.any(value)
            continue
        reference = keras.initializers.GlorotUniform(seed=1)(value.shape)
        limit = np.sqrt(6 / sum(value.shape))
        assert np.abs(value).max() <= limit
        assert np.abs(value).max() > 0.97 * limit
        np.testing.assert_allclose(value.std(), np.std(reference), rtol=0.1)
        np.testing.assert_allclose(value.std(), limit / np.sqrt(3), rtol=0.05)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
def test_rmsprop_takes_the_steps_of_kerass(keras, size):
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 3)).astype(np.float32)
    gradients = [size * rng.normal(size=(5, 3)).astype(np.float32) for _ in range(8)]
    variable = keras.Variable(start)
    theirs = keras.optimizers.RMSprop(1e-3)
    theirs.build([variable])
    tx = rmsprop(1e-3)
    params, opt_state = jnp.asarray(start), tx.init(jnp.asarray(start))
    for gradient in gradients:
        theirs.apply([jnp.asarray(gradient)], [variable])
        updates, opt_state = tx.update(jnp.asarray(gradient), opt_state, params)
        params = optax.apply_updates(params, updates)
        ours = np.asarray(params) - start
        np.testing.assert_allclose(ours, np.asarray(variable) - start, atol=2e-7)
    assert np.abs(ours).max() > 1e-7


def test_loss_is_kerass_crossentropy_of_the_softmax(keras):
    model, _, state = make_state()
    batch = next(train_set(batch_size=30).in_order())
    loss, aux = classification.make_loss_fn(model)(state.params, batch, None)
    logits = model.apply({"params": state.params}, batch["image"])
    losses = keras.losses.sparse_categorical_crossentropy(
        batch["label"], keras.activations.softmax(logits)
    )
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    right = np.argmax(logits, axis=-1) == np.asarray(batch["label"])
    np.testing.assert_allclose(aux["accuracy"], right.mean(), rtol=1e-6)


def test_under_mixed_float16_dots_are_half_and_the_softmax_is_not():
    model, tx, state = make_state(policy="mixed_float16")
    step = mpjax.make_train_step(
        classification.make_loss_fn(model), tx, policy="mixed_float16"
    )
    batch = next(train_set().in_order())
    text = step.lower(state, batch).as_text()
    assert_half_dots_and_full_softmax(text, num_dots=8)
    eval_step = classification.make_eval_step(model, "mixed_float16")
    text = eval_step.lower(state, batch).as_text()
    assert_half_dots_and_full_softmax(text, num_dots=3)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))


def test_mnists_48000_and_12000_are_the_first_and_the_last():
    y = (np.arange(60_000) % 10).astype(np.uint8)
    x = np.arange(60_000, dtype=np.float32)[:, None, None]
    data = type(cli_runs.images())("n", "the tests", x, y, x[:5], y[:5])
    splits = mnist_mlp.make_splits(mnist_mlp.Config(), data)
    train, valid = splits.train, splits.val
    assert (train.num_examples, valid.num_examples) == (48_000, 12_000)
    assert train.num_batches == 6
    assert [int(b["mask"].sum()) for b in train.in_order()] == [8192] * 5 + [7040]
    assert float(next(train.in_order())["image"][0, 0, 0]) == 0
    assert float(next(valid.in_order())["image"][0, 0, 0]) == 48_000
    seen = np.concatenate([b["image"][b["mask"], 0, 0] for b in first_epoch(train)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(48_000))


@pytest.mark.parametrize("share", [1e-4, 0.9999])
def test_a_split_without_images_is_a_config_error(share):
    config = mnist_mlp.Config(validation_split=share)
    with pytest.raises(ConfigError, match="--validation-split"):
        mnist_mlp.make_splits(config, cli_runs.images())


def test_the_padded_last_batch_gives_the_gradient_of_its_examples_alone():
    model, _, state = make_state()
    data = cli_runs.images(num=7040 + 8192)
    batches = DeviceDataset(data.x_train, data.y_train, 8192)
    *_, last = batches.in_order()
    assert (last["image"].shape[0], int(last["mask"].sum())) == (8192, 7040)
    alone = {name: value[:7040] for name, value in last.items()}
    loss_fn = classification.make_loss_fn(model)
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    padded = gradient(state.params, last, None)
    expected = gradient(state.params, alone, None)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7),
        padded,
        expected,
    )


def test_evaluation_is_what_numpy_computes():
    data = cli_runs.images(num_test=4123)
    model, _, state = make_state(dataset=data)
    splits = split(data, 100, batch_size=50, flag="")
    got = classification.make_evaluate(model, splits, "float32")(state, "test")
    loss, accuracy = numpy_evaluation(state.params, data.x_test, data.y_test)
    assert got["accuracy"] == accuracy
    np.testing.assert_allclose(got["loss"], loss, rtol=1e-5)


def test_a_short_run_on_mnist_learns_in_half_precision(real_mnist, tmp_path):
    small = type(real_mnist)(
        "mnist",
        real_mnist.source,
        real_mnist.x_train[:20_000],
        real_mnist.y_train[:20_000],
        real_mnist.x_test,
        real_mnist.y_test,
    )
    config = mnist_mlp.Config(
        num_units=32, batch_size=250, num_epochs=2, workdir=tmp_path / "run"
    )
    result = mnist_mlp.main(config, small)
    full, half = result.runs
    assert full["test_accuracy"] > 0.85
    assert abs(full["test_accuracy"] - half["test_accuracy"]) < 0.02
    assert half["loss_scale"] == "dynamic"
    assert half["final_loss_scale"] > 1


def train_set(batch_size=64):
    data = cli_runs.images()
    return DeviceDataset(data.x_train, data.y_train, batch_size)


def first_epoch(dataset):
    batches = dataset.shuffled(seed=0)
    return [next(batches) for _ in range(dataset.num_batches)]


def mpjax_paths(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(value)
        for path, value in leaves
    }


def assert_half_dots_and_full_softmax(text, *, num_dots):
    lines = text.splitlines()
    dots = [line for line in lines if "stablehlo.dot_general" in line]
    # A scalar is a sum of squares, for the norm of the gradients.
    dots = [line for line in dots if not line.endswith("-> tensor<f32>")]
    assert len(dots) == num_dots
    assert all("f16>" in line and "f32>" not in line for line in dots)
    for op in ("stablehlo.exponential", "stablehlo.log"):
        of_softmax = [line for line in lines if f"{op} " in line]
        assert of_softmax
        assert all("f32>" in line and "f16>" not in line for line in of_softmax)


def numpy_evaluation(params, x, y):
    paths = {k: v.astype(np.float64) for k, v in mpjax_paths(params).items()}
    hidden = x.reshape(len(x), -1) / 255
    for layer in range(3):
        hidden = hidden @ paths[f"Dense_{layer}/kernel"] + paths[f"Dense_{layer}/bias"]
        hidden = np.maximum(hidden, 0) if layer < 2 else hidden
    log_sum = np.log(np.exp(hidden).sum(axis=-1))
    losses = log_sum - hidden[np.arange(len(y)), y]
    return losses.mean(), np.mean(hidden.argmax(axis=-1) == y)
