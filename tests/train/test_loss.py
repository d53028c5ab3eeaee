"""What a loss may take and return, and what is said of everything else."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

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
        "what TrainState.create returned, got a dictionary with the keys 'x'",
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


def test_the_decorator_that_the_error_names_works():
    @functools.partial(mpjax.autocast, policy="mixed_float16")
    def product(x):
        return x @ x

    assert "f16" in jax.jit(product).lower(jnp.ones((2, 2))).as_text()
