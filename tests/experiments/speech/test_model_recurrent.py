"""The recurrence against flax's cells, its padding, and its row convolution."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from experiments.models.speech.recurrent import Recurrence
from experiments.models.speech.row_conv import RowConv, depthwise_conv
from mpjax._jaxpr.core import walk
from mpjax._jaxpr.loops import Scan

B, T, D, H = 4, 7, 5, 6
LENGTHS = jnp.array([7, 1, 4, 0])
rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
SEEN = np.arange(T) < np.asarray(LENGTHS)[:, None]
GATES = {"gru": "rzn", "lstm": "ifgo"}
# Most of the time goes into compiling.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CELL = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}


def flax_layer(cell, bidirectional):
    make = lambda: nn.RNN(CELL[cell](H))
    return nn.Bidirectional(make(), make()) if bidirectional else make()


def random_params(layer, *args):
    """Returns parameters of which none is 0, as biases are at the start."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), *args)["params"]
    generator = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: generator.normal(size=x.shape).astype(np.float32) * 0.4, shapes
    )


def cells_of(params):
    if "cell" in params:
        return [params["cell"]]
    return [params[name]["cell"] for name in ("forward_rnn", "backward_rnn")]


def converted(cell, params):
    """Returns flax's parameters as the recurrence's; also takes their gradients."""
    gates, cells = GATES[cell], cells_of(params)
    side = "i" if cell == "gru" else "h"  # which of the two matmuls has the bias

    def gathered(name, leaf, axis=-1):
        return [
            jnp.concatenate([c[name + gate][leaf] for gate in gates], axis)
            for c in cells
        ]

    result = {
        "kernel": jnp.concatenate(gathered("i", "kernel"), -1),
        "bias": jnp.concatenate(gathered(side, "bias"), -1),
        "recurrent_kernel": jnp.stack(gathered("h", "kernel")),
    }
    if cell == "gru":
        result["recurrent_bias"] = jnp.stack([c["hn"]["bias"] for c in cells])
    return result


@pytest.mark.parametrize(
    ("cell", "bidirectional", "unroll"),
    [
        ("gru", True, 1),
        ("lstm", False, 3),
        pytest.param("gru", False, 3, marks=pytest.mark.weekly),
        pytest.param("lstm", True, 1, marks=pytest.mark.weekly),
    ],
)
def test_equals_flax_forward_and_gradient(cell, bidirectional, unroll):
    reference = flax_layer(cell, bidirectional)
    params = random_params(reference, X)
    layer = Recurrence(H, cell, bidirectional, unroll)
    target = jnp.asarray(rng.normal(size=(B, T, (1 + bidirectional) * H)), jnp.float32)

    def flax_loss(params, x):
        y = reference.apply({"params": params}, x, seq_lengths=LENGTHS)
        y = jnp.where(SEEN[..., None], y, 0)
        return jnp.sum(y * target), y

    def loss(params, x):
        y = layer.apply({"params": params}, x, LENGTHS)
        return jnp.sum(y * target), y

    grad = lambda f: jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))
    (_, expected), (flax_grads, flax_dx) = grad(flax_loss)(params, X)
    ours = converted(cell, params)
    (_, got), (grads, dx) = grad(loss)(ours, X)
    assert {k: v.shape for k, v in ours.items()} == jax.tree.map(
        jnp.shape, random_params(layer, X, LENGTHS)
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(dx, flax_dx, atol=1e-5)
    expected_grads = converted(cell, flax_grads)
    for name, value in expected_grads.items():
        np.testing.assert_allclose(grads[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_has_as_many_parameters_as_flax(cell):
    count = lambda params: sum(x.size for x in jax.tree.leaves(params))
    ours = random_params(Recurrence(H, cell), X, LENGTHS)
    assert count(ours) == count(random_params(flax_layer(cell, True), X))


def test_each_gate_begins_with_an_orthogonal_matrix():
    params = jit(Recurrence(H).init)(jax.random.key(0), X, LENGTHS)["params"]
    gates = params["recurrent_kernel"].reshape(2, H, 3, H)
    products = jnp.einsum("nhgk,nhgl->ngkl", gates, gates)
    np.testing.assert_allclose(
        products, jnp.broadcast_to(jnp.eye(H), (2, 3, H, H)), atol=1e-5
    )
    assert len(np.unique(np.round(gates[:, 0, :, 0], 5))) == 6


def test_the_backward_direction_starts_at_each_sequences_own_end():
    """A padded sequence, reversed in its own length, gives the reversed outputs."""
    layer = Recurrence(H)
    params = random_params(layer, X, LENGTHS)
    swapped = dict(params)
    for name in ("kernel", "bias"):
        first, second = jnp.split(params[name], 2, -1)
        swapped[name] = jnp.concatenate([second, first], -1)
    for name in ("recurrent_kernel", "recurrent_bias"):
        swapped[name] = params[name][::-1]
    flipped = np.array(X)
    for row, n in enumerate(LENGTHS):
        flipped[row, :n] = flipped[row, :n][::-1]
    y = layer.apply({"params": params}, X, LENGTHS)
    z = layer.apply({"params": swapped}, jnp.asarray(flipped), LENGTHS)
    for row, n in enumerate(LENGTHS):
        forward, backward = jnp.split(z[row, :n][::-1], 2, -1)
        np.testing.assert_allclose(
            y[row, :n], jnp.concatenate([backward, forward], -1), atol=1e-6
        )


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_padding_has_no_effect_and_no_gradient(cell):
    layer = Recurrence(H, cell)
    variables = {"params": random_params(layer, X, LENGTHS)}
    apply = lambda x: layer.apply(variables, x, LENGTHS)
    run = jit(apply)
    garbage = jnp.where(SEEN[..., None], X, 1e4)
    np.testing.assert_array_equal(run(garbage), run(X))
    assert not np.any(np.asarray(run(X))[~SEEN])
    dx = jit(jax.grad(lambda x: jnp.sum(apply(x) ** 2)))(garbage)
    assert not np.any(np.asarray(dx)[~SEEN])
    assert np.all(np.any(np.asarray(dx)[SEEN], axis=-1))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_under_autocast_matmuls_are_half_and_sums_float32(cell, half):
    layer = Recurrence(H, cell)
    params = random_params(layer, X, LENGTHS)

    def loss(params, x):
        return jnp.mean(layer.apply({"params": params}, x, LENGTHS) ** 2)

    grad = mpjax.autocast(jax.grad(loss), f"mixed_{half}")
    eqns = [eqn for eqn, _, _ in walk(jax.make_jaxpr(grad)(params, X))]
    dots = [eqn for eqn in eqns if eqn.primitive.name == "dot_general"]
    operands = {str(v.aval.dtype) for eqn in dots for v in eqn.invars}
    assert operands == {half}
    gates = [e for e in eqns if e.primitive.name in ("logistic", "tanh")]
    assert gates
    assert {str(e.invars[0].aval.dtype) for e in gates} == {"float32"}
    scans = [Scan(e) for e in eqns if e.primitive.name == "scan"]
    carries = [v for s in scans for v in s.split_results(s.body.outvars)[0]]
    assert {str(v.aval.dtype) for v in carries} == {"float32"}


def test_an_unknown_cell_is_refused():
    with pytest.raises(ValueError, match='"gru" or "lstm", got \'rnn\''):
        Recurrence(H, "rnn").init(jax.random.key(0), X, LENGTHS)  # pyright: ignore


def test_row_convolution_sees_ahead_to_the_end_and_no_further():
    layer = RowConv(2)
    variables = {"params": random_params(layer, X, LENGTHS)}
    kernel = np.asarray(variables["params"]["kernel"])
    expected = np.zeros_like(X)
    for row, n in enumerate(LENGTHS):
        for t in range(n):
            for j in range(min(3, n - t)):
                expected[row, t] += kernel[j] * X[row, t + j]
    garbage = jnp.where(SEEN[..., None], X, jnp.nan)
    np.testing.assert_allclose(
        layer.apply(variables, garbage, LENGTHS), expected, atol=1e-6
    )
    grad = jax.grad(lambda x: jnp.sum(layer.apply(variables, x, LENGTHS) ** 2))(garbage)
    assert not np.any(np.asarray(grad)[~SEEN])


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_depthwise_convolution_equals_a_grouped_one(num_before):
    kernel = jnp.asarray(rng.normal(size=(3, D)), jnp.float32)
    expected = jax.lax.conv_general_dilated(
        X,
        kernel[:, None],
        (1,),
        [(num_before, 2 - num_before)],
        dimension_numbers=("NTC", "TIO", "NTC"),
        feature_group_count=D,
    )
    np.testing.assert_allclose(
        depthwise_conv(X, kernel, num_before), expected, atol=1e-6
    )


@pytest.mark.parametrize("cell", CELL)
def test_under_autocast_all_but_the_states_is_saved_in_half(cell):
    layer = Recurrence(H, cell)
    params = random_params(layer, X, LENGTHS)
    loss = lambda params: jnp.sum(layer.apply({"params": params}, X, LENGTHS))
    report = mpjax.autocast_report(jax.value_and_grad(loss), "mixed_bfloat16")(params)
    counts = {"float32": 0, "bfloat16": 0}
    for x in report.saved:
        if x.shape == (T, 2, B, H):
            counts[x.dtype] += x.count
    # Each gate's projection, and what it had of the last output.
    assert counts["bfloat16"] == 2 * len(GATES[cell])
    assert counts["float32"] == {"gru": 1, "lstm": 2}[cell]
