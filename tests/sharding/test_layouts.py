"""Layouts by rules on eight devices: specs, what follows a parameter, refusals."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.tools import regression_batch
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax import sharding
from mpjax.sharding import LayoutRules

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices; conftest makes them on a CPU"
)

RULES = [
    ("up/w$", P("fsdp", "tensor")),
    ("up/b$", P("tensor")),
    ("down/w$", P(("tensor", "fsdp"), None)),
    ("head", P()),
]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh("data=2,fsdp=2,tensor=2")


def params():
    return {
        "up": {"w": jnp.ones((8, 16)), "b": jnp.zeros(16)},
        "down": {"w": jnp.ones((16, 8))},
        "head": jnp.ones((8, 4)),
        "other": jnp.ones((4, 32)),
    }


def specs(tree, mesh, **kwargs):
    return jax.tree.map(lambda s: s.spec, sharding.state_sharding(tree, mesh, **kwargs))


EXPECTED = {
    "up": {"w": P("fsdp", "tensor"), "b": P("tensor")},
    "down": {"w": P(("tensor", "fsdp"), None)},
    "head": P(),
    "other": P(None, "fsdp"),
}


def test_rules_lay_out_parameters_and_the_rest_is_as_without(mesh):
    assert specs(params(), mesh, layout=LayoutRules(RULES)) == EXPECTED
    assert specs(params(), mesh)["up"] == {"w": P(None, "fsdp"), "b": P("fsdp")}


def test_the_first_rule_wins_and_unused_rules_are_reported(mesh):
    layout = LayoutRules([("up", P()), ("up/w", P("fsdp")), ("nowhere", P())])
    assert layout.unused_rules() == ("up", "up/w", "nowhere")
    assert specs(params(), mesh, layout=layout)["up"] == {"w": P(), "b": P()}
    assert layout.unused_rules() == ("up/w", "nowhere")


@pytest.mark.parametrize("anchored", [False, True])
def test_moments_masters_and_averages_follow_their_parameter(mesh, anchored):
    """A rule may begin with `^params/`: other arrays go by their parameter's layout."""
    rules = [(f"^params/{p}" if anchored else p, spec) for p, spec in RULES]
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    tx = mpjax.with_loss_scale(mpjax.with_master_weights(inner))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    state = mpjax.TrainState.create(params=half, tx=tx, ema=True)
    found = specs(state, mesh, layout=LayoutRules(rules))
    assert found.params == found.ema_params == EXPECTED
    masters = found.opt_state.inner_state
    assert masters.master == EXPECTED
    moments = masters.inner_state[1][0]
    assert moments.mu == moments.nu == EXPECTED
    assert moments.count == found.step == found.key == P()


def test_frozen_parameters_and_several_optimizers_keep_the_paths(mesh):
    tx = mpjax.with_loss_scale(
        optax.partition(
            {"a": optax.adam(1e-3), "b": optax.sgd(1e-3, momentum=0.9)},
            {"up": "a", "down": "b", "head": "b", "other": "a"},
        )
    )
    state = mpjax.TrainState.create(params=params(), tx=tx, trainable="up|down")
    found = specs(state, mesh, layout=LayoutRules(RULES))
    states = found.opt_state.inner_state.inner_states
    assert states["a"].inner_state[0].mu["up"] == EXPECTED["up"]
    assert states["b"].inner_state[0].trace["down"] == EXPECTED["down"]


def test_an_array_of_another_shape_has_the_built_in_layout(mesh):
    """Adafactor keeps sums over rows and over columns, by the parameter's path."""
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    state = mpjax.TrainState.create(params=params(), tx=mpjax.with_loss_scale(tx))
    found = specs(state, mesh, layout=LayoutRules(RULES))
    factored = found.opt_state.inner_state[0]
    assert factored.v_row["up"]["w"] == P("fsdp")
    assert factored.v["up"]["b"] == EXPECTED["up"]["b"]


def test_the_longest_path_decides(mesh):
    tree = {"w": jnp.ones((4, 8)), "a": {"w": jnp.ones((4, 8))}}
    layout = LayoutRules([("a/w", P("tensor")), ("w", P(None, "tensor"))])
    tx = mpjax.with_loss_scale(optax.sgd(0.1, momentum=0.9))
    state = mpjax.TrainState.create(params=tree, tx=tx)
    trace = specs(state, mesh, layout=layout).opt_state.inner_state[0].trace
    assert trace == {"w": P(None, "tensor"), "a": {"w": P("tensor")}}


def test_parameters_that_are_one_array(mesh):
    tx = mpjax.with_loss_scale(optax.adam(0.1))
    state = mpjax.TrainState.create(params=jnp.ones((4, 8)), tx=tx)
    found = specs(state, mesh, layout=LayoutRules([("params/", P("tensor"))]))
    assert found.params == found.opt_state.inner_state[0].mu == P("tensor")
    assert found.step == P()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (P("tensr"), ["'tensr'", "'data', 'fsdp', 'tensor'", "name one of them"]),
        (P("data", "fsdp", "tensor"), ["3 entries", "shape (8, 6)", "at most one"]),
        (P(None, ("fsdp", "tensor")), ["axis 1 over 4", "shape (8, 6)", "divides"]),
        (P("fsdp", "fsdp"), ["'fsdp' twice"]),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(mesh, spec, words):
    tree = {"up": {"w": jnp.ones((8, 6))}}
    for function in (sharding.state_sharding, sharding.shard_state):
        with pytest.raises(ValueError, match=r"^params/up/w: the layout's") as error:
            function(tree, mesh, layout=LayoutRules([("w", spec)]))
        for word in words:
            assert word in str(error.value)


def test_rules_that_are_none_are_refused():
    with pytest.raises(ValueError, match="not a regular expression"):
        LayoutRules([("[", P())])
    with pytest.raises(TypeError, match="list of pairs"):
        LayoutRules([("a", P(), P())])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"PartitionSpec.*got 'fsdp'"):
        LayoutRules([("a", "fsdp")])  # pyright: ignore[reportArgumentType]
    assert "P" in repr(LayoutRules(RULES))


def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] @ params["w0"] @ params["w1"] - 1) ** 2)


def small_state(tx):
    params = {"w0": jnp.ones((4, 8)) / 8, "w1": jnp.ones((8, 2))}
    return mpjax.TrainState.create(params=params, tx=tx)


SMALL = [("w0", P(None, "tensor")), ("w1", P("tensor"))]
TX = mpjax.with_loss_scale(optax.adam(1e-2))


def test_a_step_refuses_a_state_that_is_placed_otherwise(mesh):
    """Neither a forgotten layout nor another mesh is resharded at each step."""
    layout = LayoutRules(SMALL)
    batch = sharding.shard_batch(regression_batch(8), mesh)
    step = mpjax.make_train_step(loss_fn, TX, mesh=mesh, layout=layout)
    plain = mpjax.make_train_step(loss_fn, TX, mesh=mesh)
    one_device = jax.device_put(small_state(TX), jax.devices()[1])
    laid_out = sharding.shard_state(small_state(TX), mesh, layout=layout)
    for each, state, path in [
        (step, sharding.shard_state(small_state(TX), mesh), "params/w0"),
        (plain, laid_out, "params/w0"),
        (step, one_device, "step"),
        (step, laid_out.replace(opt_state=one_device.opt_state), "opt_state/"),
    ]:
        for call in (each, each.lower):
            with pytest.raises(ValueError, match=f"the step keeps {path}.*shard_state"):
                call(state, batch)
    state, _ = step(laid_out, batch)
    step(state, batch)
    with pytest.raises(ValueError, match="given to a step before"):
        step(state, batch)
    with pytest.raises(TypeError, match="takes first the state"):
        step(batch, state)


def test_a_state_on_no_device_in_particular_is_placed_by_the_step(mesh):
    layout = LayoutRules(SMALL)
    batch = regression_batch(8)
    step = mpjax.make_train_step(loss_fn, TX, mesh=mesh, layout=layout, donate=False)
    state, _ = step(small_state(TX), batch)
    sharding.check_placement(state, mesh, layout=layout)
    shapes = jax.eval_shape(lambda: (small_state(TX), batch))
    (placed, _), _ = step.lower(*shapes).compile().input_shardings
    for name, spec in (("w0", P(None, "tensor")), ("w1", P("tensor"))):
        expected = jax.sharding.NamedSharding(mesh, spec)
        moments = placed.opt_state.inner_state[0]
        for tree in (placed.params, moments.mu, moments.nu):
            assert tree[name].is_equivalent_to(expected, 2)


def test_a_step_under_jit_keeps_the_layout(mesh):
    layout = LayoutRules(SMALL)
    step = mpjax.make_train_step(
        loss_fn, TX, policy="float32", mesh=mesh, layout=layout
    )
    batch = sharding.shard_batch(regression_batch(8), mesh)
    state = sharding.shard_state(small_state(TX), mesh, layout=layout)
    three = lambda s: jax.lax.fori_loop(0, 3, lambda _, s: step(s, batch)[0], s)
    state = jax.jit(three)(state)
    sharding.check_placement(state, mesh, layout=layout)
    assert int(state.step) == 3


def test_a_rule_that_matches_nothing_is_reported_by_the_step(mesh):
    layout = LayoutRules([*SMALL, ("w2", P())])
    state = sharding.shard_state(small_state(TX), mesh, layout=layout)
    step = mpjax.make_train_step(loss_fn, TX, mesh=mesh, layout=layout)
    with pytest.warns(UserWarning, match="'w2' match no path of a parameter"):
        step(state, regression_batch(8))


def test_a_layout_needs_a_mesh_and_is_made_of_rules(mesh):
    with pytest.raises(ValueError, match="pass the mesh too"):
        mpjax.make_train_step(loss_fn, TX, layout=LayoutRules(SMALL))
    with pytest.raises(TypeError, match=r"must be mpjax\.sharding\.LayoutRules"):
        mpjax.make_train_step(loss_fn, TX, mesh=mesh, layout=SMALL)  # pyright: ignore[reportArgumentType]
