"""What a loss may take and return, and what is said of everything else."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mpjax

TX = mpjax.with_loss_scale(optax.sgd(0.1))
BATCH = {"x": jnp.arange(8.0).reshape(4, 2)}


def mean_square(params, batch):
    return jnp.mean((batch["x"] @ params["w"]).astype(jnp.float32) ** 2)


def run(loss_fn, *, model_state=None, **kwargs):
    params = {"w": jnp.ones((2, 1))}
    state = mpjax.TrainState.create(params=params, tx=TX, model_state=model_state)
    return mpjax.make_train_step(loss_fn, TX, donate=False, **kwargs)(state, BATCH)


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("checkpoint_policy", [None, "dots_saveable"])
def test_a_bare_loss_is_taken(num_microbatches, checkpoint_policy):
    kwargs = {
        "num_microbatches": num_microbatches,
        "checkpoint_policy": checkpoint_policy,
    }
    bare, bare_metrics = run(lambda p, b, k: mean_square(p, b), **kwargs)
    pair, pair_metrics = run(lambda p, b, k: (mean_square(p, b), None), **kwargs)
    assert jnp.array_equal(bare.params["w"], pair.params["w"])
    assert bare_metrics.keys() == pair_metrics.keys()
    assert float(bare_metrics["loss"]) == float(pair_metrics["loss"])


WRONG = {
    "nothing": (lambda p, b, k: None, None, "or (loss, aux), got None"),
    "a dictionary": (
        lambda p, b, k: {"loss": mean_square(p, b)},
        None,
        "got a dictionary with the keys 'loss'",
    ),
    "three values": (
        lambda p, b, k: (mean_square(p, b), 1, 2),
        None,
        "got a tuple of 3: (float32[], 1, 2)",
    ),
    "aux first": (
        lambda p, b, k: ({"n": 1}, mean_square(p, b)),
        None,
        "got a tuple of 2: (a dictionary with the keys 'n', float32[])",
    ),
    "text in aux": (
        lambda p, b, k: (mean_square(p, b), {"name": "x"}),
        None,
        "aux['name'] must be an array, got 'x'",
    ),
    "an integer": (
        lambda p, b, k: jnp.round(mean_square(p, b)).astype(int),
        None,
        "must return a real, floating loss, got int32",
    ),
    "no derivative": (
        lambda p, b, k: jnp.round(mean_square(p, b)),
        None,
        "the loss does not depend on the trained parameters",
    ),
    "parameters from outside": (
        lambda p, b, k: mean_square({"w": jnp.ones((2, 1))}, b),
        None,
        "must compute with the params that it is given",
    ),
    "no mean": (lambda p, b, k: b["x"] @ p["w"], None, "got shape (4, 1)"),
    "no key": (
        lambda params, batch: mean_square(params, batch),
        None,
        "called as loss_fn(params, batch, key), but it takes (params, batch)",
    ),
    "no argument for the model state": (
        lambda params, batch, key: (mean_square(params, batch), None),
        {"n": jnp.zeros(3)},
        "the state has a model state, so loss_fn is called as loss_fn(params, "
        "model_state, batch, key), but it takes (params, batch, key)",
    ),
    "an argument for a model state that is not there": (
        lambda params, model_state, batch, key: mean_square(params, batch),
        None,
        "the state has no model state",
    ),
    "no new model state": (
        lambda p, s, b, k: mean_square(p, b),
        {"n": jnp.zeros(3)},
        "must return (loss, (model_state, aux)), with aux None for none, got float32[]",
    ),
    "aux and no model state": (
        lambda p, s, b, k: (mean_square(p, b), {"n": 1, "m": 2}),
        {"n": jnp.zeros(3)},
        "got a tuple of 2: (float32[], a dictionary with the keys 'n', 'm')",
    ),
    "a model state of other keys": (
        lambda p, s, b, k: (mean_square(p, b), ({"m": s["n"]}, None)),
        {"n": jnp.zeros(3)},
        "{['n'] float32[3]}, got {['m'] float32[3]}",
    ),
    "a model state of another shape": (
        lambda p, s, b, k: (mean_square(p, b), ({"n": s["n"][:2]}, None)),
        {"n": jnp.zeros(3)},
        "{['n'] float32[3]}, got {['n'] float32[2]}",
    ),
}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_any_other_form_is_refused_with_what_is_right_and_what_came(name, autocast):
    loss_fn, model_state, said = WRONG[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        run(loss_fn, model_state=model_state, autocast=autocast)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def bare(params, batch, key):
    return mean_square(params, batch)


def create(**kwargs):
    return mpjax.TrainState.create(
        **({"params": {"w": jnp.ones((2, 1))}, "tx": TX} | kwargs)
    )


def step(batch=BATCH, state=None, **kwargs):
    make = mpjax.make_train_step(bare, TX, **kwargs)
    return make(create() if state is None else state, batch)


def use_twice():
    state, train_step = create(), mpjax.make_train_step(bare, TX)
    train_step(state, BATCH)
    train_step(state, BATCH)


def module_from_outside(is_merged):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)

    def loss_fn(params, batch, key):
        used = nnx.merge(graphdef, params) if is_merged else model
        used.kernel[...] = used.kernel[...] * batch["x"].sum()
        return jnp.mean(used(batch["x"]) ** 2)

    return mpjax.make_train_step(loss_fn, TX)(create(params=params), BATCH)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)


MISTAKES = {
    "an optimizer not called": (
        lambda: mpjax.with_loss_scale(optax.adam),
        "call it, as in adam(1e-3)",
    ),
    "a loss scale first": (
        lambda: mpjax.with_loss_scale(mpjax.DynamicLossScale(), optax.adam(1e-3)),
        "with_loss_scale(tx, loss_scale)",
    ),
    "an optimizer not called, in create": (
        lambda: mpjax.TrainState.create(params={}, tx=optax.adam),
        "call it, as in adam(1e-3)",
    ),
    "optimizer and loss exchanged": (
        lambda: mpjax.make_train_step(TX, bare),
        "make_train_step(loss_fn, tx) takes a function first",
    ),
    "an optimizer not called, in the step": (
        lambda: mpjax.make_train_step(bare, optax.adam),
        "call it, as in adam(1e-3)",
    ),
    "a float number of microbatches": (
        lambda: mpjax.make_train_step(bare, TX, num_microbatches=2.0),
        "num_microbatches=2.0 must be a whole number",
    ),
    "state and batch exchanged": (
        lambda: mpjax.make_train_step(bare, TX)(
            BATCH, mpjax.TrainState.create(params={"w": jnp.ones((2, 1))}, tx=TX)
        ),
        "which TrainState.create returned, got a dictionary with the keys 'x'",
    ),
    "a state used twice": (
        use_twice,
        "go on with the state that the step returned",
    ),
    "an Equinox model": (
        lambda: create(params=eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))),
        "params.activation must be an array, got the function relu",
    ),
    "an NNX model": (
        lambda: create(params=nnx.Linear(2, 1, rngs=nnx.Rngs(0))),
        "nnx.split(model, nnx.Param, ...)",
    ),
    "a Linen module": (
        lambda: create(params=Network()),
        "model.init(key, x)['params']",
    ),
    "text as parameter": (
        lambda: create(params={"w": jnp.ones(2), "name": "dense"}),
        "params['name'] must be an array, got 'dense'",
    ),
    "a function in the model state": (
        lambda: create(model_state={"act": jnp.tanh}),
        "model_state['act'] must be an array, got the function tanh",
    ),
    "text in a batch": (
        lambda: step(BATCH | {"name": "abc"}),
        "batch['name'] must be an array of numbers, got 'abc'",
    ),
    "an array of text in a batch": (
        lambda: step(BATCH | {"name": np.array(["a", "b", "c", "d"])}),
        "batch['name'] must be an array of numbers",
    ),
    "a legacy key": (
        lambda: create(key=jax.random.PRNGKey(0)),
        "convert a legacy key with jax.random.wrap_key_data",
    ),
    "a number as key": (
        lambda: create(key=0),
        "expected a typed key, such as jax.random.key(0), got 0",
    ),
    "no loss scale": (
        lambda: create(tx=optax.adam(1e-3)),
        "tx = mpjax.with_loss_scale(tx)",
    ),
    "another optimizer": (
        lambda: step(state=create(tx=mpjax.with_loss_scale(optax.adam(0.1)))),
        "pass the same tx to TrainState.create and make_train_step",
    ),
    "another loss scale": (
        lambda: step(
            state=create(
                tx=mpjax.with_loss_scale(optax.sgd(0.1), mpjax.NoOpLossScale())
            )
        ),
        "pass the same tx to TrainState.create and make_train_step",
    ),
    "a loss scale not called": (
        lambda: mpjax.with_loss_scale(optax.sgd(0.1), mpjax.DynamicLossScale),
        "such as mpjax.DynamicLossScale())",
    ),
    "a loss scale's name": (
        lambda: mpjax.with_loss_scale(optax.sgd(0.1), "dynamic"),
        "mpjax.parse_loss_scale(name)",
    ),
    "a number as loss scale": (
        lambda: mpjax.with_loss_scale(optax.sgd(0.1), 2**15),
        "mpjax.StaticLossScale(number)",
    ),
    "an optimizer's state as loss scale": (
        lambda: mpjax.NonFiniteGuard(create().opt_state),
        "expected a loss scale",
    ),
    "loss and optimizer state exchanged": (
        lambda: mpjax.scale_loss(create().opt_state, 1.0),
        "the loss comes first: scale_loss(loss, opt_state)",
    ),
    "an unknown policy": (
        lambda: step(policy="mixed_fp16"),
        "Did you mean 'mixed_float16'?",
    ),
    "a dtype as policy": (
        lambda: step(policy=jnp.float16),
        "a policy must be a name such as 'mixed_float16'",
    ),
    "a policy of half parameters": (
        lambda: step(policy="bf16"),
        "keeps parameters in half precision, but w is float32",
    ),
    "float64 without x64": (
        lambda: step(policy="float64"),
        "set JAX_ENABLE_X64=1",
    ),
    "a dictionary of rules": (
        lambda: mpjax.PolicyRules({"a": "float32"}, default="float32"),
        "rules must be a list of pairs",
    ),
    "a decay without an average": (
        lambda: step(ema_decay=0.9),
        "TrainState.create(..., ema=True)",
    ),
    "pieces that do not divide the batch": (
        lambda: step(num_microbatches=3),
        "cannot be cut into num_microbatches=3 equal pieces",
    ),
    "devices in place of a mesh": (
        lambda: step(mesh=jax.devices()),
        "mesh must be a jax.sharding.Mesh",
    ),
    "a mesh without a data axis": (
        lambda: step(mesh=jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])),
        "a batch is split over 'data' or 'fsdp'",
    ),
    "an axis without shard_map": (
        lambda: step(axis_name="data"),
        "a step with axis_name= runs inside jax.shard_map",
    ),
    "a wrong expression": (
        lambda: step(no_cast_inputs="("),
        "no_cast_inputs='(' is not a regular expression",
    ),
    "an unknown checkpoint policy": (
        lambda: step(checkpoint_policy="dots"),
        "is none of dots_saveable",
    ),
    "a metric's name in aux": (
        lambda: run(lambda p, b, k: (mean_square(p, b), {"loss": 1})),
        "aux uses the names of the step's own metrics: loss",
    ),
    "parameters in place of the state": (
        lambda: mpjax.make_eval_step(bare)(create().params, BATCH),
        "takes first the state, which TrainState.create returned",
    ),
    "inputs and labels apart": (
        lambda: mpjax.make_train_step(bare, TX)(create(), BATCH["x"], BATCH["x"]),
        "a step takes (state, batch): put several arrays into one batch",
    ),
    "an evaluation that takes a key": (
        lambda: mpjax.make_eval_step(bare)(create(), BATCH),
        "eval_fn is called as eval_fn(params, batch)",
    ),
    "an evaluation of an average that is not there": (
        lambda: mpjax.make_eval_step(lambda p, b: p, use_ema=True)(create(), BATCH),
        "use_ema=True needs TrainState.create(..., ema=True)",
    ),
    "a policy in place of a function": (
        lambda: mpjax.autocast("mixed_float16"),
        "@functools.partial(mpjax.autocast, ...)",
    ),
    "a result in place of a function": (
        lambda: mpjax.full_precision(jnp.ones(3)),
        "mpjax.full_precision takes the function first",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_put_together_wrongly_raises_at_once(name):
    make, said = MISTAKES[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert said in str(caught.value)


@pytest.mark.parametrize("is_merged", [True, False])
def test_a_module_from_outside_that_is_changed_gets_a_hint(is_merged):
    if is_merged:  # Within one trace, flax allows it.
        module_from_outside(is_merged)
        return
    with pytest.raises(Exception, match="different trace level") as caught:
        module_from_outside(is_merged)
    assert any("copy=True" in note for note in caught.value.__notes__)


TABLE = jnp.linspace(0.0, 1.0, 16)  # float32


def scan_body(h, w):
    return (h + jnp.tanh(h @ w)) * (1 + TABLE), None


CARRIES = {
    "scan": lambda x, w: jax.lax.scan(scan_body, x, w)[0],
    "fori_loop": lambda x, w: jax.lax.fori_loop(0, 3, lambda i, h: h * TABLE, x),
    "while_loop": lambda x, w: jax.lax.while_loop(
        lambda c: c[1] < 3, lambda c: (jnp.tanh(c[0] * TABLE), c[1] + 1), (x, 0)
    )[0],
    "cond": lambda x, w: jax.lax.cond(x.sum() > 0, lambda x: x * TABLE, lambda x: x, x),
    "scan in a jit in a scan": lambda x, w: jax.lax.scan(
        lambda h, _: (jax.jit(CARRIES["scan"])(h, w), None), x, jnp.arange(2)
    )[0],
}


@pytest.mark.parametrize("name", CARRIES)
def test_a_carry_that_casts_made_unequal_gets_a_hint(name):
    """The hint names the operation that made it float32; autocast needs none."""

    def loss_fn(params, batch, key):
        out = CARRIES[name](batch, params["w"])
        return jnp.mean(out.astype(jnp.float32) ** 2) + jnp.sum(params["w"]) * 0

    state = create(params={"w": jnp.zeros((3, 16, 16))})
    options = {"policy": "mixed_bfloat16", "donate": False}
    train_step = mpjax.make_train_step(loss_fn, TX, autocast=False, **options)
    with pytest.raises(TypeError, match="equal") as caught:
        train_step(state, jnp.ones((4, 16)))
    hint = next(note for note in caught.value.__notes__ if "autocast=True" in note)
    assert "became float32 in mul at test_loss.py:" in hint
    assert "where it met float32[" in hint
    if name not in ("fori_loop", "while_loop"):
        _, metrics = mpjax.make_train_step(loss_fn, TX, **options)(
            state, jnp.ones((4, 16))
        )
        assert bool(metrics["grads_finite"])


def test_linen_variables_given_whole_are_told():
    variables = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.zeros(2)}}
    with pytest.warns(UserWarning, match="params has 'params' and 'batch_stats'"):
        create(params=variables)


@pytest.mark.parametrize("aux", [lambda x: x, lambda x: {"logits": x}])
def test_aux_per_example_is_told_with_microbatches(aux):
    def loss_fn(params, batch, key):
        return mean_square(params, batch), aux(batch["x"] @ params["w"])

    with pytest.warns(UserWarning, match="unrelated examples would be mixed"):
        run(loss_fn, num_microbatches=2)
    run(loss_fn)


def test_the_decorator_that_the_error_names_works():
    @functools.partial(mpjax.autocast, policy="mixed_float16")
    def product(x):
        return x @ x

    assert "f16" in jax.jit(product).lower(jnp.ones((2, 2))).as_text()


@pytest.mark.parametrize("checkpoint_policy", [None, "dots_saveable"])
@pytest.mark.parametrize("has_aux", [True, False])
def test_a_loss_that_is_scaled_already_is_refused(has_aux, checkpoint_policy):
    state = create()

    def loss_fn(params, batch, key):
        scaled = mpjax.scale_loss(mean_square(params, batch), state.opt_state)
        return (scaled, None) if has_aux else scaled

    train_step = mpjax.make_train_step(
        loss_fn, TX, checkpoint_policy=checkpoint_policy, donate=False
    )
    with pytest.raises(ValueError, match="make_train_step scales the loss itself"):
        train_step(state, BATCH)


def test_a_loss_scaled_for_an_optimizer_inside_is_no_mistake():
    def loss_fn(params, batch, key):
        inner_state = TX.init(params)
        inner = lambda p: mpjax.scale_loss(mean_square(p, batch), inner_state)
        updates, _ = TX.update(jax.grad(inner)(params), inner_state, params)
        return mean_square(optax.apply_updates(params, updates), batch)

    _, metrics = run(loss_fn, policy="float32")
    assert bool(metrics["grads_finite"])


HALF = {"w": jnp.ones((2, 1), jnp.float16)}


@pytest.mark.parametrize("policy", ["mixed_float16", "float32"])
def test_half_parameters_whose_updates_round_away_are_told(policy):
    with pytest.warns(UserWarning, match="w is float16.*cast_to_param.*master_weights"):
        step(state=create(params=HALF), policy=policy)


@pytest.mark.parametrize(
    "wrap", [mpjax.with_master_weights, mpjax.with_stochastic_rounding]
)
def test_half_parameters_that_lose_no_update_are_fine(wrap):
    tx = mpjax.with_loss_scale(wrap(optax.sgd(0.1)))
    state = create(params=HALF, tx=tx)
    mpjax.make_train_step(bare, tx, policy="mixed_float16")(state, BATCH)


class Statistics:
    """A container without `==`, as Equinox's `State` is."""

    def __init__(self, mean):
        self.mean = mean


jax.tree_util.register_pytree_node(
    Statistics, lambda node: ((node.mean,), None), lambda _, leaves: Statistics(*leaves)
)


def test_a_model_state_is_compared_by_its_leaves():
    def loss_fn(params, model_state, batch, key):
        mean = model_state.mean + batch["x"].mean(axis=0)
        return mean_square(params, batch), (Statistics(mean), None)

    state, _ = run(loss_fn, model_state=Statistics(jnp.zeros(2)), policy="float32")
    assert state.model_state.mean.tolist() == [3, 4]
    with pytest.raises(ValueError, match="must have the structure and shapes"):
        run(loss_fn, model_state=Statistics(jnp.zeros(())))
