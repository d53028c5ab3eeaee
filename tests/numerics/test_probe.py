"""Probes: the right numbers under the right names, and nothing else changed."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import thinned
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import mpjax
from mpjax.numerics import exponent_histogram, probe, tap

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 8))
W = 0.3 * jax.random.normal(jax.random.key(1), (8, 8))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert np.asarray(a).dtype == np.asarray(b).dtype


def assert_counts(histogram, *arrays):
    """Asserts that a histogram counts some arrays."""
    assert_same(histogram, exponent_histogram(list(arrays)))


def mlp(w, x):
    with jax.named_scope("first"):
        h = jnp.tanh(x @ w)
    with jax.named_scope("second"):
        return jnp.sum((h @ w) ** 2)


def scanned(w, x):
    def body(h, _):
        with jax.named_scope("cell"):
            return jnp.tanh(h @ w), h.sum()

    h, sums = lax.scan(body, x, None, 5)
    return jnp.sum(h**2) + sums.sum()


def nested_scan(w, x):
    def outer(h, _):
        return lax.scan(lambda h, _: (jnp.sin(h @ w), None), h, None, 2)[0], None

    return lax.scan(outer, x, None, 3, reverse=True)[0].sum()


def rematted(w, x):
    @jax.checkpoint
    def block(h):
        return jnp.tanh(h @ w)

    return jnp.sum(block(block(x)) ** 2)


def rematted_scan(w, x):
    body = jax.checkpoint(lambda h, _: (jnp.tanh(h @ w), None))
    return jnp.sum(lax.scan(body, x, None, 4)[0] ** 2)


def branched(w, x):
    h = lax.cond(x[0, 0] > -9, lambda h: jnp.tanh(h @ w), lambda h: (h @ w) @ w, x)
    return jnp.sum(h**2)


def jitted(w, x):
    layer = jax.jit(lambda h: jnp.tanh(h @ w))
    return jnp.sum(layer(layer(x)) ** 2)


@jax.custom_vjp
def own_rule(h, w):
    return h @ w


own_rule.defvjp(
    lambda h, w: (h @ w, (h, w)), lambda s, g: (2 * g @ s[1].T, 3 * s[0].T @ g)
)


def with_own_rule(w, x):
    return jnp.sum(own_rule(x, w) ** 2)


def with_relu(w, x):
    return jnp.sum(jax.nn.relu(x @ w) ** 2)


def convolved(w, x):
    y = lax.conv_general_dilated(x[None, None], w[None, None], (1, 1), "SAME")
    return jnp.sum(jnp.tanh(y) ** 2)


def solved(w, x):
    """The jaxprs inside a linear solve stand in a namedtuple."""
    square = w.T @ w + jnp.eye(w.shape[1])
    return jnp.sum(jnp.linalg.solve(square, (x @ w).T) ** 2)


FUNCTIONS = [
    mlp,
    scanned,
    nested_scan,
    rematted,
    rematted_scan,
    branched,
    jitted,
    with_own_rule,
    with_relu,
    convolved,
    solved,
]


@pytest.mark.parametrize("fn", thinned(FUNCTIONS, 4), ids=lambda f: f.__name__)
@pytest.mark.parametrize("tapped", thinned([True, False]))
def test_outputs_and_gradients_are_bitwise_those_of_the_plain_function(fn, tapped):
    plain = jax.value_and_grad(fn, argnums=(0, 1))
    inner = tap(fn) if tapped else fn
    probed = probe(jax.value_and_grad(inner, argnums=(0, 1)))
    outputs, histograms = probed(W, X)
    assert_same(outputs, jax.jit(plain)(W, X))
    assert histograms
    (outputs, _) = jax.jit(probed)(W, X)
    assert_same(outputs, jax.jit(plain)(W, X))


def test_values_and_cotangents_of_an_mlp():
    a = X @ W
    h = jnp.tanh(a)
    b = h @ W
    db = 2 * b
    dh = db @ W.T
    da = dh * (1 - h**2)
    _, found = probe(jax.value_and_grad(tap(mlp)))(W, X)
    assert set(found) == {
        "first/dot_general",
        "second/dot_general",
        "first/dot_general (backward)",
        "second/dot_general (backward)",
        "second/dot_general (backward)#2",
    }
    assert_counts(found["first/dot_general"].values, a)
    assert_counts(found["second/dot_general"].values, b)
    assert_counts(found["second/dot_general"].cotangents, db)
    assert_counts(found["first/dot_general"].cotangents, da)
    assert_counts(found["first/dot_general (backward)"].values, X.T @ da)


@pytest.mark.parametrize("fn", thinned([scanned, rematted_scan]))
def test_runs_in_a_loop_add_up(fn):
    _, found = probe(jax.grad(tap(fn)))(W, X)
    name = "cell/dot_general" if fn is scanned else "dot_general"
    h, values = X, []
    for _ in range(5 if fn is scanned else 4):
        values.append(h @ W)
        h = jnp.tanh(values[-1])
    assert_counts(found[name].values, *values)
    assert int(found[name].cotangents.num_values) == len(values) * X.size


def test_rematerialization_is_not_counted_twice():
    _, found = probe(jax.value_and_grad(tap(rematted)))(W, X)
    assert_counts(found["dot_general"].values, X @ W)
    assert_counts(found["dot_general#2"].values, jnp.tanh(X @ W) @ W)
    _, found = probe(jax.value_and_grad(rematted))(W, X)
    forward = [n for n in found if "backward" not in n]
    assert forward == ["dot_general", "dot_general#2"]


def test_the_branch_not_taken_counts_nothing():
    _, found = probe(branched)(W, X)
    counted = [int(h.values.num_values) for h in found.values()]
    assert sorted(counted) == [0, 0, X.size]


def test_a_rule_of_its_own_is_looked_into():
    _, found = probe(jax.grad(with_own_rule))(W, X)
    assert_counts(found["dot_general"].values, X @ W)
    backward = [h.values for name, h in found.items() if "backward" in name]
    assert_counts(backward[-1], 3 * X.T @ (2 * (X @ W)))


def test_a_while_loop_adds_up():
    def fn(w, x):
        step = lambda state: (state[0] + 1, jnp.tanh(state[1] @ w))
        return lax.while_loop(lambda state: state[0] < 3, step, (0, x))

    outputs, found = probe(fn)(W, X)
    assert_same(outputs, jax.jit(fn)(W, X))
    values, h = [], X
    for _ in range(3):
        values.append(h @ W)
        h = jnp.tanh(values[-1])
    assert_counts(found["dot_general"].values, *values)


def test_named_values_and_further_primitives():
    def fn(w, x):
        return jnp.sum(checkpoint_name(jnp.tanh(x @ w), "hidden"))

    _, found = probe(fn, ops=("tanh",))(W, X)
    assert list(found) == ["dot_general", "tanh", "hidden"]
    assert_counts(found["hidden"].values, jnp.tanh(X @ W))
    assert_same(found["hidden"].values, found["tanh"].values)
    _, found = probe(jax.grad(tap(fn, ops=("tanh",))), ops=("tanh",))(W, X)
    assert_counts(found["tanh"].cotangents, jnp.ones_like(X))


def test_float16_underflow_is_seen_where_it_happens():
    policy = mpjax.get_policy("mixed_float16")
    fn = lambda w, x: 1e-9 * jnp.mean(jnp.tanh(x @ w) @ w)
    probed = probe(mpjax.autocast(jax.grad(tap(fn)), policy))
    _, found = probed(W, X)
    zeros = found["dot_general#2"].cotangents.zeros
    assert int(zeros) == X.size
    _, found = probe(mpjax.autocast(jax.grad(tap(lambda w, x: 1e9 * fn(w, x)))))(W, X)
    assert int(found["dot_general#2"].cotangents.zeros) == 0


@pytest.mark.slow
def test_a_model_and_its_train_step():
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            x = flax.linen.relu(flax.linen.Dense(16, name="encoder")(x))
            return flax.linen.Dense(3, name="head")(x)

    model = Model()

    def loss_fn(params, batch, key):
        logits = model.apply(params, batch)
        return jnp.mean(logits.astype(jnp.float32) ** 2), {}

    tx = mpjax.with_loss_scale(optax.adam(1e-3))
    make = lambda loss_fn: mpjax.make_train_step(
        loss_fn, tx, policy="mixed_float16", donate=False
    )
    create = lambda: mpjax.TrainState.create(params=model.init(KEY, X), tx=tx, key=KEY)
    probed = probe(make(tap(loss_fn)))
    (state, metrics), found = probed(create(), X)
    plain_state, plain_metrics = make(loss_fn)(create(), X)
    assert_same(state.params, plain_state.params)
    assert_same(metrics, plain_metrics)
    assert {"Model/encoder/dot_general", "Model/head/dot_general"} <= set(found)
    head = found["Model/head/dot_general"]
    assert int(head.values.num_values) == int(head.cotangents.num_values) == 4 * 3

    @jax.jit
    def sampled(state, batch):
        return probed.when(state.step % 2 == 0, state, batch)

    state = plain = create()
    for i in range(3):
        (state, _), found = sampled(state, X)
        plain, _ = make(loss_fn)(plain, X)
        assert_same(state.params, plain.params)
        counted = {int(h.values.num_values) > 0 for h in found.values()}
        assert counted == {i % 2 == 0}


def test_under_vmap_and_with_static_leaves():
    xs = jnp.stack([X, 2 * X])
    fn = lambda w, x, kind: {"loss": mlp(w, x), "kind": kind}
    outputs, found = jax.vmap(lambda x: probe(lambda: mlp(W, x))())(xs)
    assert outputs.shape == (2,)
    assert found["first/dot_general"].values.zeros.shape == (2,)
    outputs, _ = probe(fn)(W, X, kind="a")
    assert outputs["kind"] == "a"


def test_nothing_to_look_at():
    outputs, found = probe(lambda x: jnp.sin(x))(X)
    assert found == {}
    assert_same(outputs, jax.jit(jnp.sin)(X))


def test_bad_input():
    with pytest.raises(TypeError, match="differentiate inside"):
        jax.grad(lambda w: probe(mlp)(w, X)[0])(W)
    with pytest.raises(TypeError, match="collection of names"):
        probe(mlp, ops="tanh")
    with pytest.raises(TypeError, match="collection of names"):
        tap(mlp, ops="tanh")
    with pytest.raises(ValueError, match="swap"):
        probe(mlp, lo=3, hi=2)(W, X)
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    for wrap in (probe, tap):
        with pytest.raises(TypeError, match="NNX"):
            wrap(lambda m, x: m(x))(layer, np.ones((1, 2)))


def test_a_tap_compiles_to_nothing():
    for fn in (mlp, scanned, rematted):
        gradient = jax.jit(jax.grad(fn)).lower(W, X).compile().cost_analysis()
        tapped = jax.jit(jax.grad(tap(fn))).lower(W, X).compile().cost_analysis()
        assert tapped["flops"] == gradient["flops"]
