"""The CTC loss of padded batches: values, infeasible alignments, padding, float32."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from experiments.models.speech.loss import ctc_loss, mean_ctc_loss
from mpjax._jaxpr.core import walk

LABELS = jnp.array([[1, 2, 2], [2, 1, 0], [1, 1, 1], [3, 3, 0], [0, 0, 0], [0, 0, 0]])
NUM_LABELS = jnp.array([3, 2, 3, 2, 0, 0])
NUM_OUTPUTS = jnp.array([5, 2, 4, 3, 3, 0])
# The third needs 3 labels and 2 blanks; the last is padding.
FEASIBLE = [True, True, False, True, True, False]
rng = np.random.default_rng(0)
LOGITS = jnp.asarray(rng.normal(size=(6, 5, 4)), jnp.float32)
GRAD = jax.jit(jax.grad(lambda x: mean_ctc_loss(x, NUM_OUTPUTS, LABELS, NUM_LABELS)[0]))


def by_enumeration(logits, labels):
    """Sums the probabilities of all alignments, in float64."""
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        if [k for k, _ in itertools.groupby(path) if k != 0] == list(labels):
            total += np.exp(sum(log_probs[t, k] for t, k in enumerate(path)))
    return -np.log(total)


def test_the_loss_is_the_sum_over_alignments():
    losses, is_feasible = ctc_loss(LOGITS, NUM_OUTPUTS, LABELS, NUM_LABELS)
    assert is_feasible.tolist() == FEASIBLE
    for row, loss in enumerate(losses):
        expected = 0.0
        if FEASIBLE[row]:
            labels = np.asarray(LABELS[row, : NUM_LABELS[row]])
            expected = by_enumeration(LOGITS[row, : NUM_OUTPUTS[row]], labels)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, 0.0])
def test_what_has_no_loss_has_a_gradient_of_exactly_zero(bad):
    behind = np.arange(5) >= np.asarray(NUM_OUTPUTS)[:, None]
    behind |= ~np.array(FEASIBLE)[:, None]
    logits = jnp.where(behind[..., None], bad, LOGITS)
    got = np.asarray(GRAD(logits))
    assert not np.any(got[behind])
    np.testing.assert_array_equal(got, GRAD(LOGITS))
    assert np.all(np.isfinite(got))
    assert np.all(np.any(got[~behind], axis=-1))


def test_the_mean_is_over_utterances_and_infeasible_ones_are_counted():
    loss, counts = mean_ctc_loss(LOGITS, NUM_OUTPUTS, LABELS, NUM_LABELS)
    losses, _ = ctc_loss(LOGITS, NUM_OUTPUTS, LABELS, NUM_LABELS)
    assert {k: int(v) for k, v in counts.items()} == {
        "num_utterances": 5,
        "num_infeasible": 1,
    }
    np.testing.assert_allclose(loss, losses.sum() / 5, rtol=1e-6)


def test_a_batch_of_padding_has_loss_and_gradient_zero():
    zeros = jnp.zeros(6, jnp.int32)
    fn = lambda x: mean_ctc_loss(x, zeros, LABELS, zeros)[0]
    loss, grad = jax.value_and_grad(fn)(LOGITS)
    assert float(loss) == 0
    assert not np.any(grad)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_under_autocast_the_loss_is_computed_in_float32(policy):
    fn = lambda w, x: mean_ctc_loss(x @ w, NUM_OUTPUTS, LABELS, NUM_LABELS)[0]
    w = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
    cast = mpjax.autocast(jax.value_and_grad(fn), policy)
    half = policy.removeprefix("mixed_")
    eqns = [e for e, _, _ in walk(jax.make_jaxpr(cast)(w, LOGITS))]
    in_loss = [e for e in eqns if e.primitive.name in ("scan", "exp", "log1p", "log")]
    assert in_loss
    dtypes = {str(v.aval.dtype) for e in in_loss for v in (*e.invars, *e.outvars)}
    assert half not in dtypes
    dots = [e for e in eqns if e.primitive.name == "dot_general"]
    assert any(str(e.invars[0].aval.dtype) == half for e in dots)
    # Half logits, rounded once, then everything in float32.
    dtype = jnp.dtype(half)
    logits = jnp.matmul(
        LOGITS.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32
    )
    expected = mean_ctc_loss(logits, NUM_OUTPUTS, LABELS, NUM_LABELS)[0]
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(cast(w, LOGITS)[0], expected, rtol=4 * eps)
