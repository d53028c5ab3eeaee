"""Layers and functions of other libraries, under autocast beside float32.

The layers of Linen, NNX, Equinox and Haiku, the losses of optax, the attention, linear
algebra and Fourier transforms of jax. Errors are relative, in the 2-norm: of the
output, and of the gradient's worst leaf. The bounds are two to three times the largest
that was measured over the layers, on jax 0.10 and 0.12.
"""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import layers
from helpers.layers import FLAT, MATMUL_NAMES, Case, normal
from helpers.tools import assert_same_bits, leaf_bytes, thinned

import mpjax
from mpjax._jaxpr.core import check_jaxpr, dtype_of, open_jaxpr, walk

# Per half dtype: the error of outputs, and of gradients.
BOUNDS = {"bfloat16": (1.3e-2, 3e-2), "float16": (1.6e-3, 4e-3)}
# Compiles in half the time, to the same numbers up to float32's own rounding.
FAST = {"xla_backend_optimization_level": 0}


def of_logits(fn, num_classes=6):
    """Returns a maker of a case: a function of the logits of a linear layer."""
    w = normal(16, num_classes, seed=1) / 4
    return lambda: Case(lambda w, x: (fn(x @ w), None), w, FLAT)


LABELS = np.array([0, 5, 2, 3, 1, 1, 4, 0])
ONE_HOT = np.eye(6, dtype=np.float32)[LABELS]
SIGNS = 2 * ONE_HOT - 1
TARGETS = normal(8, 6, seed=2)
PROBABILITIES = np.asarray(jax.nn.softmax(TARGETS))
LOSSES = {
    "integer_labels": lambda h: optax.softmax_cross_entropy_with_integer_labels(
        h, LABELS
    ),
    "softmax_cross_entropy": lambda h: optax.softmax_cross_entropy(h, ONE_HOT),
    "safe_softmax": lambda h: optax.losses.safe_softmax_cross_entropy(h, ONE_HOT),
    "poly_loss": lambda h: optax.losses.poly_loss_cross_entropy(h, ONE_HOT),
    "sigmoid_binary": lambda h: optax.sigmoid_binary_cross_entropy(h, ONE_HOT),
    "sigmoid_focal": lambda h: optax.sigmoid_focal_loss(h, ONE_HOT),
    "l2_loss": lambda h: optax.l2_loss(h, TARGETS),
    "squared_error": lambda h: optax.squared_error(h, TARGETS),
    "huber_loss": lambda h: optax.huber_loss(h, TARGETS),
    "log_cosh": lambda h: optax.log_cosh(h, TARGETS),
    "cosine_similarity": lambda h: optax.cosine_similarity(h, TARGETS, epsilon=1e-6),
    "cosine_distance": lambda h: optax.cosine_distance(h, TARGETS, epsilon=1e-6),
    "hinge_loss": lambda h: optax.hinge_loss(h, SIGNS),
    "multiclass_hinge": lambda h: optax.losses.multiclass_hinge_loss(h, LABELS),
    "kl_divergence": lambda h: optax.kl_divergence(
        jax.nn.log_softmax(h), PROBABILITIES
    ),
    "kl_with_log_targets": lambda h: optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(h), np.log(PROBABILITIES)
    ),
    "generalized_kl": lambda h: optax.losses.generalized_kl_divergence(
        jax.nn.log_softmax(h), PROBABILITIES
    ),
    "ranking_softmax": lambda h: optax.losses.ranking_softmax_loss(h, PROBABILITIES),
    "triplet_margin": lambda h: optax.losses.triplet_margin_loss(
        h, TARGETS, h[::-1], margin=8.0
    ),
    "ntxent": lambda h: optax.losses.ntxent(h, LABELS),
}


def attention(*, num_kv_heads=4, **kwargs):
    """Returns projections to queries, keys and values, then `jax.nn`'s attention."""
    w = {
        name: normal(16, heads, 8, seed=seed) / 4
        for seed, (name, heads) in enumerate(
            {"q": 4, "k": num_kv_heads, "v": num_kv_heads}.items()
        )
    }

    def fn(w, x):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[name]) for name in "qkv")
        return jax.nn.dot_product_attention(q, k, v, **kwargs), None

    return lambda: Case(fn, w, layers.SEQUENCE)


ATTENTION = {
    "plain": attention(),
    "mask": attention(mask=layers.CAUSAL),
    "bias": attention(bias=normal(1, 4, 6, 6, seed=5)),
    "causal": attention(is_causal=True),
    "scale": attention(scale=0.1),
    "gqa": attention(num_kv_heads=2),
    "mqa": attention(num_kv_heads=1, is_causal=True),
    "local_window": attention(local_window_size=(2, 0)),
    "lengths": attention(key_value_seq_lengths=np.array([6, 3, 1, 4])),
}
CASES = (
    layers.CASES
    | {f"optax-{name}": of_logits(fn) for name, fn in LOSSES.items()}
    | {f"attention-{name}": case for name, case in ATTENTION.items()}
)


def argnums_of(case):
    return (0, 1) if jnp.issubdtype(case.x.dtype, jnp.floating) else 0


def loss_of(case):
    """Returns a loss that weighs every output differently; the outputs are its aux."""

    def loss(params, x):
        y, state = case.fn(params, x)
        leaves = jax.tree.leaves(y)
        weights = [normal(*leaf.shape, seed=9) for leaf in leaves]
        return sum(map(jnp.sum, map(jnp.multiply, leaves, weights))), (y, state)

    return loss


def gradient_of(case):
    return jax.value_and_grad(loss_of(case), argnums_of(case), has_aux=True)


def forms_of(case, policy):
    """Yields both ways to autocast a gradient."""
    options = {"argnums": argnums_of(case), "has_aux": True}
    loss = loss_of(case)
    return [
        mpjax.autocast(jax.value_and_grad(loss, **options), policy),
        jax.value_and_grad(mpjax.autocast(loss, policy), **options),
    ]


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile(FAST)(*args)


@functools.cache
def traced_in_float32(name):
    """Returns a case, and the jaxpr of its gradient."""
    case = CASES[name]()
    return case, jax.make_jaxpr(gradient_of(case))(case.params, case.x)


@functools.cache
def computed_in_float32(name):
    """Returns the results of a case's gradient."""
    case, _ = traced_in_float32(name)
    return compiled(gradient_of(case), case.params, case.x)


def numbers(tree):
    """Returns the leaves as float64, PRNG keys by their data."""

    def number(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x, np.float64)

    return [number(x) for x in jax.tree.leaves(tree)]


def relative_error(tree, truth):
    """Returns the worst leaf's error, relative to the leaf or a tenth of the mean."""
    tree, truth = numbers(tree), numbers(truth)
    mean = np.sqrt(sum(np.sum(t**2) for t in truth) / len(truth))
    return max(
        np.linalg.norm(x - t) / max(np.linalg.norm(t), mean / 10, 1e-30)
        for x, t in zip(tree, truth, strict=True)
    )


def kinds(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype) for x in leaves]


def matmuls(closed):
    return [eqn for eqn, _, _ in walk(closed) if eqn.primitive.name in MATMUL_NAMES]


def contracts_nothing(eqn):
    """Whether a matmul is an outer product: no sum, so nothing to gain from half."""
    if eqn.primitive.name != "dot_general":
        return False
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted]) <= 1


def check_matmuls(closed, traced, half):
    """Asserts that every traced matmul is there; in half, or a scalar product."""
    found = matmuls(closed)
    assert len(found) == len(matmuls(traced)) > 0
    for eqn in found:
        dtypes = {str(dtype_of(v)) for v in (*eqn.invars, *eqn.outvars)}
        may_be_full = contracts_nothing(eqn) or is_scalar_product(eqn)
        assert dtypes == {half} or (may_be_full and dtypes == {"float32"}), eqn


def is_scalar_product(eqn):
    """Whether a `dot_general` has as many results as it has batches."""
    if eqn.primitive.name != "dot_general":
        return False
    lhs, (batch, _) = eqn.invars[0].aval.shape, eqn.params["dimension_numbers"][1]
    return eqn.outvars[0].aval.size == np.prod([lhs[axis] for axis in batch])


# Layers of the other libraries do the same by other code.
AGAIN = ("equinox", "haiku")


@pytest.mark.parametrize(
    "name",
    thinned([n for n in CASES if not n.startswith(AGAIN)], 8)
    + thinned([n for n in CASES if n.startswith(AGAIN)], 12),
)
def test_a_layer_is_half_in_every_matmul(name):
    case, traced = traced_in_float32(name)
    for fn in forms_of(case, "mixed_bfloat16"):
        closed = jax.make_jaxpr(fn)(case.params, case.x)
        check_jaxpr(open_jaxpr(closed))
        check_matmuls(closed, traced, "bfloat16")


def cases_and_halves():
    """Yields some layers of each library in bfloat16; the others are weekly."""
    weekly = pytest.mark.weekly
    for index, name in enumerate(CASES):
        marks = [weekly] if index % 12 else []
        yield pytest.param(name, "bfloat16", id=f"{name}-bfloat16", marks=marks)
        yield pytest.param(name, "float16", id=f"{name}-float16", marks=weekly)


@pytest.mark.parametrize(("name", "half"), list(cases_and_halves()))
def test_a_layer_is_near_float32(name, half):
    case, traced = traced_in_float32(name)
    truth = computed_in_float32(name)
    forms = forms_of(case, f"mixed_{half}")
    for fn in forms:
        closed = jax.make_jaxpr(fn)(case.params, case.x)
        check_jaxpr(open_jaxpr(closed))
        check_matmuls(closed, traced, half)
    results = compiled(lambda *args: [fn(*args) for fn in forms], case.params, case.x)
    for result in results:
        check_numbers(result, truth, BOUNDS[half])
        check_state(result[0][1][1], truth[0][1][1], case.state, BOUNDS[half][0])


def check_numbers(result, truth, bounds):
    assert kinds(result) == kinds(truth)
    (_, (y, _)), grads = result
    (_, (true_y, _)), true_grads = truth
    assert 1e-5 < relative_error(y, true_y) < bounds[0]
    assert 1e-5 < relative_error(grads, true_grads) < bounds[1]


def check_state(state, truth, before, bound):
    """Asserts that the state is float32's up to rounding, and changed where it did."""
    assert kinds(state) == kinds(before)
    leaves = zip(*map(jax.tree.leaves, (state, truth, before)), strict=True)
    for leaf, true, old in leaves:
        if jnp.issubdtype(true.dtype, jnp.floating):
            assert relative_error(leaf, true) < bound
        else:
            assert_same_bits(leaf, true)
        new, old = numbers((leaf, true)), numbers(old)[0]
        assert len({np.array_equal(x, old) for x in new}) == 1


@pytest.mark.parametrize("name", [n for n in CASES if "BatchNorm" in n])
def test_batch_norm_moves_its_statistics_in_training_only(name):
    case, _ = traced_in_float32(name)
    (_, (_, state)), _ = computed_in_float32(name)
    moved = leaf_bytes(state) != leaf_bytes(case.state)
    assert moved == ("train" in name)


DROPOUTS = {
    "linen": lambda: layers.linen(
        nn.Sequential([nn.Dense(16), nn.Dropout(0.4, deterministic=False)]),
        FLAT,
        wrap=False,
    ),
    "nnx": lambda: layers.of_nnx(
        lambda r: nnx.Sequential(nnx.Linear(16, 16, rngs=r), nnx.Dropout(0.4, rngs=r)),
        FLAT,
        wrap=False,
    ),
    "equinox": lambda: layers.equinox(
        lambda k: eqx.nn.Sequential(
            [eqx.nn.Linear(16, 16, key=next(k)), eqx.nn.Dropout(0.4)]
        ),
        FLAT,
        lambda m, x: jax.vmap(m)(x, key=jax.random.split(layers.KEY, len(x))),
    ),
    "haiku": lambda: layers.haiku(
        lambda x: hk.dropout(hk.next_rng_key(), 0.4, hk.Linear(16)(x)), FLAT, wrap=False
    ),
}


@pytest.mark.parametrize("half", thinned(BOUNDS))
@pytest.mark.parametrize("library", thinned(DROPOUTS))
def test_dropout_drops_the_same_units(library, half):
    case = DROPOUTS[library]()
    full, _ = case.fn(case.params, case.x)
    y, _ = mpjax.autocast(case.fn, f"mixed_{half}")(case.params, case.x)
    assert 0.25 < np.mean(full == 0) < 0.55
    np.testing.assert_array_equal(y == 0, full == 0)
    assert 1e-5 < relative_error(y, full) < BOUNDS[half][0]


def ctc(loss_fn):
    """Four utterances of eight frames, twelve labels, blank 0."""
    labels = normal(4, 5, seed=3)
    labels = 1 + np.argsort(labels, axis=-1)
    label_paddings = (np.arange(5) >= np.array([[5], [4], [2], [3]])).astype(np.float32)
    paddings = (np.arange(12) >= np.array([[12], [10], [9], [12]])).astype(np.float32)
    return lambda h: loss_fn(h, paddings, labels, label_paddings)


@pytest.mark.parametrize("half", thinned(BOUNDS))
def test_ctc_loss_is_for_full_precision(half):
    """The CTC loss gathers by a matmul, with sentinels of -1e5 among the values."""
    logits = normal(4, 12, 12)

    def grad_of(loss_fn):
        per_example = ctc(loss_fn)
        total = lambda h: (jnp.sum(losses := per_example(h)), losses)
        return jax.grad(total, has_aux=True)

    def errors(loss_fn):
        cast = mpjax.autocast(grad_of(loss_fn), f"mixed_{half}")
        pairs = zip(jax.jit(cast)(logits), truth, strict=True)
        return np.array([relative_error(*pair) for pair in pairs])

    truth = jax.jit(grad_of(optax.ctc_loss))(logits)
    cast, kept = errors(optax.ctc_loss), errors(mpjax.full_precision(optax.ctc_loss))
    assert (cast > 1e-5).all()
    assert (kept < cast / 30).all()


MATRIX = normal(5, 5, seed=4) + 4 * np.eye(5, dtype=np.float32)
RIGHT = normal(5, 3, seed=2)
LINALG = {
    "solve": lambda a: jnp.linalg.solve(a, RIGHT),
    "inv": jnp.linalg.inv,
    "pinv": jnp.linalg.pinv,
    "lstsq": lambda a: jnp.linalg.lstsq(a, RIGHT)[0],
    "qr": jnp.linalg.qr,
    "svd": jnp.linalg.svd,
    "cholesky": lambda a: jnp.linalg.cholesky(a + a.T + 8 * jnp.eye(5)),
    "eigh": lambda a: jnp.linalg.eigh(a + a.T),
    "norm": jnp.linalg.norm,
    "norm_nuclear": lambda a: jnp.linalg.norm(a, "nuc"),
    "det": jnp.linalg.det,
    "lu": lambda a: jax.scipy.linalg.lu(a)[1:],
    "solve_triangular": lambda a: jax.scipy.linalg.solve_triangular(a, RIGHT),
    "fft": lambda a: jnp.abs(jnp.fft.fft(a)),
    "rfft": lambda a: jnp.abs(jnp.fft.rfft(a)) ** 2,
    "ifft2": lambda a: jnp.real(jnp.fft.ifft2(jnp.fft.fft2(a) ** 2)),
    "fftconvolve": lambda a: jax.scipy.signal.fftconvolve(a, RIGHT),
}


def weighed(fn):
    def loss(a):
        leaves = jax.tree.leaves(fn(a))
        return sum(jnp.sum(y * normal(*y.shape, seed=9)) for y in leaves)

    return loss


@pytest.mark.parametrize("name", thinned(LINALG, 8))
def test_linear_algebra_keeps_every_bit(name):
    """No matmul of a decomposition, a solver or their derivatives is half."""
    fn = LINALG[name]
    value, grad = jax.jit(fn)(MATRIX), jax.jit(jax.grad(weighed(fn)))(MATRIX)
    for half in BOUNDS:
        cast = functools.partial(mpjax.autocast, policy=f"mixed_{half}")
        assert_same_bits(jax.jit(cast(fn))(MATRIX), value)
        assert_same_bits(jax.jit(jax.grad(weighed(cast(fn))))(MATRIX), grad)
        cast_grad = jax.jit(cast(jax.grad(weighed(fn))))(MATRIX)
        assert_same_bits(cast_grad, grad)


@pytest.mark.parametrize("half", BOUNDS)
def test_linear_algebra_of_a_half_matmul_is_float32(half):
    def fn(a):
        h = a @ a.T
        return jnp.linalg.cholesky(h), jnp.linalg.eigvalsh(h), jnp.fft.rfft(h).real

    grad = jax.grad(weighed(fn))
    closed = jax.make_jaxpr(mpjax.autocast(grad, f"mixed_{half}"))(MATRIX)
    dtypes = {
        eqn.primitive.name: {str(dtype_of(v)) for v in eqn.invars}
        for eqn, _, _ in walk(closed)
    }
    assert dtypes["cholesky"] == dtypes["eigh"] == {"float32"}
    assert dtypes["fft"] <= {"float32", "complex64"}
    assert half in {str(dtype_of(eqn.outvars[0])) for eqn in matmuls(closed)}
    result = jax.jit(mpjax.autocast(grad, f"mixed_{half}"))(MATRIX)
    assert relative_error(result, jax.jit(grad)(MATRIX)) < BOUNDS[half][1]
