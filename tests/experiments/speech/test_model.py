"""A padded batch gives what its utterances give one at a time; the train step."""

import functools
import operator

import flax.linen as nn
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
# The sums of a matmul, a convolution or a statistic go in an order that depends on the
# shape of the batch: about 1e-6 after a few layers of float32.
ATOL = 2e-5


def make(encoder, **options):
    model = SpeechModel(
        NUM_CLASSES,
        encoder,
        num_channels=3,
        num_units=8,
        kernel_sizes=((5, 3), (3, 3)),
        lookahead=3,
        num_heads=2,
        conv_size=5,
        **options,
    )
    return model, variables_of(model)


@functools.cache
def variables_of(model):
    """Random parameters, and running statistics that are not those of the start."""
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), FEATURES, LENGTHS)
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [
        x + 0.2 * jax.random.uniform(k, x.shape)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(noise)


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


@pytest.mark.parametrize("subsampling", [2, 4])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_padded_batch_gives_the_losses_of_one_utterance_at_a_time(
    encoder, subsampling
):
    model, variables = make(encoder, subsampling=subsampling)
    run = jax.jit(functools.partial(model.apply, train=False))
    logits, num_outputs = run(
        variables, padded_by(BATCH, value=1e3)["features"], LENGTHS
    )
    assert num_outputs.tolist() == [-(-n // subsampling) for n in LENGTHS]
    labels = BATCH["labels"], BATCH["num_labels"]
    losses, is_feasible = ctc_loss(logits, num_outputs, *labels)
    assert is_feasible.tolist() == [True, True, True, True, False]
    for row, n in enumerate(LENGTHS[:4]):
        alone, num = model.apply(
            variables, FEATURES[row : row + 1, :n], LENGTHS[row : row + 1], train=False
        )
        assert num.tolist() == [alone.shape[1]] == [num_outputs[row]]
        np.testing.assert_allclose(logits[row, : num[0]], alone[0], atol=ATOL)
        one = (x[row : row + 1] for x in labels)
        loss = ctc_loss(alone, num, *one).losses[0]
        np.testing.assert_allclose(losses[row], loss, atol=10 * ATOL, rtol=ATOL)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_more_padding_changes_no_loss_gradient_or_statistic_in_training(encoder):
    model, variables = make(encoder)
    fn = jax.jit(jax.value_and_grad(functools.partial(train_loss, model), has_aux=True))
    (loss, (stats, counts)), grads = fn(*split(variables), BATCH)
    more = padded_by(BATCH, frames=7, rows=2, value=50.0)
    (loss_2, (stats_2, counts_2)), grads_2 = fn(*split(variables), more)
    np.testing.assert_allclose(loss, loss_2, rtol=ATOL)
    assert counts == counts_2
    assert int(counts["num_utterances"]) == 4
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
    close = functools.partial(
        np.testing.assert_allclose, rtol=1e-4, atol=1e-4 * max(largest, 1)
    )
    jax.tree.map(close, grads, grads_2)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4), stats, stats_2
    )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_padding_frames_get_a_gradient_of_exactly_zero(encoder):
    model, variables = make(encoder)
    params, stats = split(variables)

    def loss(features):
        return train_loss(model, params, stats, BATCH | {"features": features})[0]

    grad = np.asarray(
        jax.jit(jax.grad(loss))(padded_by(BATCH, value=np.nan)["features"])
    )
    assert not np.any(grad[~SEEN])
    assert np.all(np.isfinite(grad))
    assert np.any(grad[SEEN])


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


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_batch_of_padding_has_no_nan_in_loss_gradient_or_statistics(encoder):
    model, variables = make(encoder)
    zeros = np.zeros(B, np.int32)
    batch = BATCH | {"num_frames": zeros, "num_labels": zeros}
    fn = jax.jit(jax.value_and_grad(functools.partial(train_loss, model), has_aux=True))
    (loss, (stats, _)), grads = fn(*split(variables), batch)
    assert float(loss) == 0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(stats))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("encoder", ENCODERS)
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
    assert sum(is_half) > 15
    loss, grads = jax.jit(cast)(*split(variables))
    expected = jax.jit(fn)(*split(variables))
    np.testing.assert_allclose(loss, expected, rtol=30 * float(jnp.finfo(half).eps))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("encoder", ENCODERS)
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

    assert count() == 280_323
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
        SpeechModel(5, **options).init(jax.random.key(0), FEATURES, LENGTHS, train=True)


def test_conformer_attention_and_convolution_see_no_padding():
    block = ConformerBlock(num_heads=2, kernel_size=5)
    x = zero_padding(jnp.asarray(FEATURES), jnp.asarray(LENGTHS))
    variables = nn.meta.unbox(block.init(jax.random.key(0), x, LENGTHS, train=False))
    y = block.apply(variables, x, LENGTHS, train=False)
    garbage = jnp.where(SEEN[..., None], x, 1e3)
    np.testing.assert_allclose(
        block.apply(variables, garbage, LENGTHS, train=False), y, atol=1e-6
    )
    assert not np.any(np.asarray(y)[~SEEN])
