"""A padded batch gives what its utterances give one at a time; the train step."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from experiments.models.speech import SpeechModel, ctc_loss, mean_ctc_loss
from experiments.models.speech.conformer import ConformerBlock
from experiments.models.speech.padding import MaskedBatchNorm, zero_padding
from mpjax._jaxpr.core import walk

NUM_CLASSES, F, B, T = 5, 8, 5, 19
LENGTHS = np.array([19, 4, 13, 1, 0], np.int32)
rng = np.random.default_rng(0)
FEATURES = rng.normal(size=(B, T, F)).astype(np.float32)
SEEN = np.arange(T) < LENGTHS[:, None]
BATCH = {
    "features": FEATURES,
    "num_frames": LENGTHS,
    "labels": rng.integers(1, NUM_CLASSES, (B, 3)).astype(np.int32),
    "num_labels": np.array([3, 1, 2, 1, 0], np.int32),
}
ENCODERS = ["bigru", "bilstm", "gru_lookahead", "conformer"]
weekly = functools.partial(pytest.param, marks=pytest.mark.weekly)
ONE_ENCODER = ["bigru", *(weekly(encoder) for encoder in ENCODERS[1:])]
# Most of the time goes into compiling.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# The sums of a matmul, a convolution or a statistic go in an order that depends on the
# shape of the batch: about 1e-6 after a few layers of float32.
ATOL = 2e-5


def make(encoder, *, num_layers=1, **options):
    model = SpeechModel(
        NUM_CLASSES,
        encoder,
        num_channels=3,
        num_units=8,
        num_layers=num_layers,
        kernel_sizes=((5, 3), (3, 3)),
        lookahead=3,
        num_heads=2,
        conv_size=5,
        **options,
    )
    return model, variables_of(model)


@functools.cache
def variables_of(model):
    """Random parameters and running statistics, of the sizes that training begins with.

    They are not those of the start, in which biases are zero and an error would hide.
    """
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), FEATURES, LENGTHS)
    generator = np.random.default_rng(1)

    def random(path, x):
        name = path[-1].key
        if name in ("scale", "var"):
            return generator.uniform(0.7, 1.3, x.shape).astype(np.float32)
        fan_in = x.size // x.shape[-1] if "kernel" in name else 10
        noise = generator.normal(size=x.shape) * fan_in**-0.5
        return noise.astype(np.float32)

    return jax.tree_util.tree_map_with_path(random, shapes)


def padded_by(batch, frames=0, rows=0, value=0.0):
    """Returns the batch with more padding in time, and more rows of padding."""
    padded = jax.tree.map(
        lambda x: np.pad(x, ((0, rows), *((0, 0),) * (x.ndim - 1))), batch
    )
    width = ((0, 0), (0, frames), (0, 0))
    features = np.pad(padded["features"], width)
    behind = np.arange(features.shape[1]) >= padded["num_frames"][:, None]
    features[behind] = value
    return padded | {"features": features}


def losses_of(model, variables, batch):
    logits, num_outputs = model.apply(
        variables, batch["features"], batch["num_frames"], train=False
    )
    return ctc_loss(logits, num_outputs, batch["labels"], batch["num_labels"])


def train_loss(model, params, stats, batch):
    (logits, num_outputs), changed = model.apply(
        {"params": params, **stats},
        batch["features"],
        batch["num_frames"],
        train=True,
        mutable=list(stats),
    )
    loss, counts = mean_ctc_loss(
        logits, num_outputs, batch["labels"], batch["num_labels"]
    )
    return loss, (changed, counts)


def split(variables):
    params = variables["params"]
    return params, {k: v for k, v in variables.items() if k != "params"}


@pytest.mark.parametrize(
    ("subsampling", "rows"), [(2, [2]), weekly(2, [0, 1, 3]), weekly(4, [0, 1, 2, 3])]
)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_padded_batch_gives_the_losses_of_one_utterance_at_a_time(
    encoder, subsampling, rows
):
    model, variables = make(encoder, num_layers=2, subsampling=subsampling)

    @jit
    def run(batch):
        logits, num_outputs = model.apply(
            variables, batch["features"], batch["num_frames"], train=False
        )
        losses = ctc_loss(logits, num_outputs, batch["labels"], batch["num_labels"])
        return logits, num_outputs, losses

    logits, num_outputs, (losses, is_feasible) = run(padded_by(BATCH, value=1e3))
    assert num_outputs.tolist() == [-(-n // subsampling) for n in LENGTHS]
    assert is_feasible.tolist() == [True, True, True, True, False]
    for row in rows:
        one = {name: x[row : row + 1] for name, x in BATCH.items()}
        one["features"] = one["features"][:, : LENGTHS[row]]
        alone, num, (loss, _) = run(one)
        assert num.tolist() == [alone.shape[1]] == [num_outputs[row]]
        np.testing.assert_allclose(logits[row, : num[0]], alone[0], atol=ATOL)
        np.testing.assert_allclose(losses[row], loss[0], rtol=ATOL)


@functools.cache
def gradient_fn(encoder):
    """Returns `batch -> ((loss, (stats, counts)), (grads, d_features))`, compiled."""
    model, variables = make(encoder)
    params, stats = split(variables)

    def loss(params, features, batch):
        return train_loss(model, params, stats, batch | {"features": features})

    fn = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return lambda batch: fn(params, batch["features"], batch)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ONE_ENCODER)
def test_more_padding_changes_no_loss_gradient_or_statistic_in_training(encoder):
    fn = gradient_fn(encoder)
    (loss, (stats, counts)), (grads, _) = fn(BATCH)
    more = padded_by(BATCH, frames=7, rows=2, value=50.0)
    (loss_2, (stats_2, counts_2)), (grads_2, _) = fn(more)
    np.testing.assert_allclose(loss, loss_2, rtol=ATOL)
    assert counts == counts_2
    assert int(counts["num_utterances"]) == 4
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=ATOL)
    jax.tree.map(close, stats, stats_2)
    scaled = lambda tree: jax.tree.map(lambda g: g / largest, tree)
    jax.tree.map(close, scaled(grads), scaled(grads_2))


@pytest.mark.parametrize("encoder", ONE_ENCODER)
def test_padding_frames_get_a_gradient_of_exactly_zero(encoder):
    _, (_, grad) = gradient_fn(encoder)(padded_by(BATCH, value=np.nan))
    grad = np.asarray(grad)
    assert not np.any(grad[~SEEN])
    assert np.all(np.isfinite(grad))
    assert np.all(np.any(grad[SEEN], axis=-1))


@pytest.mark.parametrize("encoder", ONE_ENCODER)
def test_a_batch_of_padding_has_no_nan_in_loss_gradient_or_statistics(encoder):
    zeros = np.zeros(B, np.int32)
    (loss, (stats, _)), grads = gradient_fn(encoder)(
        BATCH | {"num_frames": zeros, "num_labels": zeros}
    )
    assert float(loss) == 0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(stats))


def test_masked_batch_norm_has_the_statistics_of_the_real_frames():
    norm = MaskedBatchNorm(momentum=0.0)
    x = zero_padding(jnp.asarray(FEATURES), jnp.asarray(LENGTHS))
    variables = norm.init(jax.random.key(0), x, LENGTHS, train=True)
    y, changed = norm.apply(variables, x, LENGTHS, train=True, mutable=["batch_stats"])
    real = FEATURES[SEEN].astype(np.float64)
    stats = changed["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], real.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["var"], real.var(0), rtol=1e-5)
    expected = (real - real.mean(0)) / np.sqrt(real.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y)[SEEN], expected, atol=1e-5)
    assert not np.any(np.asarray(y)[~SEEN])


@pytest.mark.parametrize("half", ["float16", weekly("bfloat16")])
@pytest.mark.parametrize("encoder", ONE_ENCODER)
def test_under_autocast_the_model_runs_in_half_near_its_float32_loss(encoder, half):
    model, variables = make(encoder)
    fn = lambda p, stats: train_loss(model, p, stats, BATCH)[0]
    cast = mpjax.autocast(jax.value_and_grad(fn), f"mixed_{half}")
    closed = jax.make_jaxpr(cast)(*split(variables))
    matmuls = [
        eqn
        for eqn, _, _ in walk(closed)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    is_half = [{str(v.aval.dtype) for v in e.invars} == {half} for e in matmuls]
    # The others are the sums over classes and labels in the loss.
    assert sum(not x for x in is_half) <= 4
    assert sum(is_half) > 10
    loss, grads = jit(cast)(*split(variables))
    (expected, _), _ = gradient_fn(encoder)(BATCH)
    np.testing.assert_allclose(loss, expected, rtol=30 * float(jnp.finfo(half).eps))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "policy", [weekly("float32"), "mixed_float16", weekly("mixed_bfloat16")]
)
@pytest.mark.parametrize("encoder", ONE_ENCODER)
def test_the_model_learns_in_the_train_step(encoder, policy):
    model, variables = make(encoder, dropout_rate=0.1 if policy == "float32" else 0.0)
    params, stats = split(variables)

    def loss_fn(params, model_state, batch, key):
        (logits, num_outputs), changed = model.apply(
            {"params": params, **model_state},
            batch["features"],
            batch["num_frames"],
            train=True,
            mutable=list(model_state),
            rngs={"dropout": key},
        )
        loss, counts = mean_ctc_loss(
            logits, num_outputs, batch["labels"], batch["num_labels"]
        )
        return loss, (changed, counts)

    tx = mpjax.with_loss_scale(optax.adam(1e-2))
    step = mpjax.make_train_step(loss_fn, tx, policy=policy, donate=False)
    state = mpjax.TrainState.create(
        params=params, tx=tx, model_state=stats, key=jax.random.key(0)
    )
    losses = []
    for _ in range(12):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0], losses
    assert int(metrics["num_utterances"]) == 4
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), stats, state.model_state)
    assert jax.tree.reduce(operator.and_, moved)


def test_the_default_is_small_and_fields_make_it_large():
    def count(**options):
        model = SpeechModel(27, **options)
        shape = jax.ShapeDtypeStruct((1, 20, 40), jnp.float32)
        frames = jax.ShapeDtypeStruct((1,), jnp.int32)
        init = functools.partial(model.init, train=False)
        params = jax.eval_shape(init, jax.random.key(0), shape, frames)["params"]
        return sum(x.size for x in jax.tree.leaves(params))

    assert count() == 276_467
    large = count(num_channels=32, num_units=896, num_layers=4)
    assert 45e6 < large < 55e6, large


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"encoder": "gru"}, "must be one of bigru, bilstm, .* got 'gru'"),
        ({"subsampling": 3}, "subsampling must be 2 or 4, got 3"),
        ({"encoder": "conformer", "num_units": 12}, "multiple of 2 \\* num_heads = 8"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        variables_of(SpeechModel(5, **options))


def test_conformer_attention_and_convolution_see_no_padding():
    block = ConformerBlock(num_heads=2, kernel_size=5)
    x = zero_padding(jnp.asarray(FEATURES), jnp.asarray(LENGTHS))
    variables = variables_of(block)
    run = jit(functools.partial(block.apply, variables, train=False))
    y = run(x, LENGTHS)
    garbage = jnp.where(SEEN[..., None], x, 1e3)
    np.testing.assert_array_equal(run(garbage, LENGTHS), y)
    assert not np.any(np.asarray(y)[~SEEN])
