"""Policies by name, by jmp string and by rule."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest

import mpjax
from mpjax.policy import Float8Policy, cast_to_compute, resolve


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("float32", "p=full,c=full,o=full"),
        ("float64", "p=f64,c=f64,o=f64"),
        ("mixed_float16", "p=full,c=f16,o=full"),
        ("mixed_bfloat16", "p=full,c=bf16,o=full"),
        ("mixed_float8", "mixed_float8"),
        ("mixed_float8: all", "mixed_float8:all"),
        ("float16", "p=f16,c=f16,o=f16"),
        ("bfloat16", "p=bf16,c=bf16,o=bf16"),
        ("p=f32, c=f16, o=f32", "p=full,c=f16,o=full"),
        ("params=float32,compute=bfloat16", "p=full,c=bf16,o=bf16"),
        (" c = f16 ", "p=full,c=f16,o=f16"),
        ("f16", "p=f16,c=f16,o=f16"),
        ("full", "p=full,c=full,o=full"),
    ],
)
def test_get_policy(spec, text):
    policy = mpjax.get_policy(spec)
    assert isinstance(policy, jmp.Policy)
    assert str(policy) == text


def test_a_policy_is_returned_as_it_is():
    policy = jmp.get_policy("p=f32,c=f16,o=bf16")
    assert mpjax.get_policy(policy) is policy


@pytest.mark.parametrize("spec", ["mixed_flaot16", "p=f31", "", "x=f32", "p=f32=f16"])
def test_unknown_policies(spec):
    with pytest.raises(ValueError, match="mixed_bfloat16") as error:
        mpjax.get_policy(spec)
    assert repr(spec) in str(error.value)
    if spec == "mixed_flaot16":
        assert "Did you mean 'mixed_float16'" in str(error.value)


def test_other_types():
    with pytest.raises(TypeError, match=r"jmp\.Policy"):
        mpjax.get_policy(jnp.float16)  # pyright: ignore[reportArgumentType]


def test_first_matching_rule_wins_and_unused_rules_are_reported():
    rules = mpjax.PolicyRules(
        [
            ("Dense_1/bias", "float32"),
            ("Dense_1", "mixed_bfloat16"),
            ("Conv", "float16"),
        ],
        default="mixed_float16",
    )
    assert rules.unused_rules() == ("Dense_1/bias", "Dense_1", "Conv")
    assert rules.policy_for("params/Dense_1/bias").compute_dtype == jnp.float32
    assert rules.policy_for("params/Dense_1/kernel").compute_dtype == jnp.bfloat16
    assert rules.policy_for("params/Dense_0/kernel").compute_dtype == jnp.float16
    assert rules.unused_rules() == ("Conv",)
    assert "Dense_1/bias" in repr(rules)


def test_bad_rules():
    with pytest.raises(ValueError, match="not a regular expression"):
        mpjax.PolicyRules([("[", "float32")], default="float32")
    with pytest.raises(ValueError, match="unknown policy"):
        mpjax.PolicyRules([("a", "float33")], default="float32")


def test_cast_by_rules_touches_floating_arrays_only():
    tree = {
        "Dense_0": {"kernel": jnp.ones((2, 2)), "count": jnp.int32(2049)},
        "Dense_1": {"kernel": np.ones((2, 2), np.float32)},
        "key": jax.random.key(0),
        "name": "text",
        "float": 3.0,
        "none": None,
    }
    rules = mpjax.PolicyRules([("Dense_1", "float32")], default="mixed_float16")
    out = cast_to_compute(rules, tree, root="params")
    assert out["Dense_0"]["kernel"].dtype == jnp.float16
    assert out["Dense_1"]["kernel"].dtype == jnp.float32
    assert out["Dense_0"]["count"] is tree["Dense_0"]["count"]
    assert out["key"] is tree["key"]
    assert (out["name"], out["float"], out["none"]) == ("text", 3.0, None)


def test_no_cast_inputs_stay():
    rules = resolve("mixed_float16")
    batch = {"image": jnp.ones(2), "Labels": jnp.float32([2049, 2049])}
    out = cast_to_compute(rules, batch, root="batch", no_cast="(?i)label")
    assert out["image"].dtype == jnp.float16
    assert out["Labels"] is batch["Labels"]
    weak = {"Labels": jnp.full(2, 2049.0)}
    assert weak["Labels"].weak_type
    label = cast_to_compute(rules, weak, root="batch", no_cast="(?i)label")["Labels"]
    assert (label * jnp.ones(2, jnp.float16)).tolist() == [2049, 2049]
    pair = (jnp.ones(2), jnp.ones(2))
    out = cast_to_compute(rules, pair, root="batch", no_cast="^1$")
    assert (out[0].dtype, out[1].dtype) == (jnp.float16, jnp.float32)


def test_rules_must_say_their_default():
    with pytest.raises(TypeError, match="default"):
        mpjax.PolicyRules([("head", "float32")])  # pyright: ignore[reportCallIssue]


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        mpjax.PRESETS["mine"] = "f16"  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("name", ["mixed_float8", "mixed_float8:all"])
def test_float8_is_a_policy_that_computes_in_bfloat16(name):
    policy = mpjax.get_policy(name)
    assert isinstance(policy, Float8Policy)
    assert policy.param_dtype == policy.output_dtype == jnp.float32
    assert policy.compute_dtype == jnp.bfloat16
    assert policy.value_dtype == jnp.float8_e4m3fn
    assert policy.cotangent_dtype == jnp.float8_e5m2
    for other in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert other == policy
        assert hash(other) == hash(policy)
    assert policy != mpjax.get_policy("mixed_bfloat16")
    assert repr(policy) == f"Float8Policy({name!r})"
    assert mpjax.get_policy(str(policy)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.compute_dtype = jnp.float32  # pyright: ignore[reportAttributeAccessIssue]
    narrow = policy.with_output_dtype(jnp.bfloat16)
    assert isinstance(narrow, Float8Policy)
    assert narrow != policy
    assert str(narrow) == f"{name}(p=full,c=bf16,o=bf16)"


def test_float8_at_all_sizes_is_another_policy():
    policy = mpjax.get_policy("mixed_float8:all")
    assert isinstance(policy, Float8Policy)
    assert policy.all_sizes
    usual = dataclasses.replace(policy, all_sizes=False)
    assert usual == mpjax.get_policy("mixed_float8") != policy


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("field", ["param_dtype", "compute_dtype", "output_dtype"])
def test_dtypes_that_nothing_computes_in_are_refused(dtype, field):
    policy = dataclasses.replace(
        mpjax.get_policy("mixed_bfloat16"), **{field: jnp.dtype(dtype)}
    )
    with pytest.raises(ValueError, match=f"{dtype}.*'mixed_float8'"):
        mpjax.autocast(jnp.sin, policy)


@pytest.mark.parametrize(
    ("policy", "autocast"),
    [
        ("mixed_float8", False),
        (mpjax.PolicyRules([("a", "mixed_float8")], default="float32"), False),
        (mpjax.PolicyRules([("a", "bfloat16")], default="mixed_float8"), True),
    ],
)
def test_float8_is_refused_without_autocast(policy, autocast):
    tx = mpjax.with_loss_scale(optax.sgd(0.1), mpjax.NoOpLossScale())
    for make in (
        lambda **options: mpjax.make_train_step(lambda *_: 0.0, tx, **options),
        lambda **options: mpjax.make_eval_step(lambda *_: 0.0, **options),
    ):
        with pytest.raises(ValueError, match="'mixed_bfloat16'"):
            make(policy=policy, autocast=autocast)


@pytest.mark.parametrize(
    ("name", "preset"), [("fp16", "mixed_float16"), ("bf16-mixed", "mixed_bfloat16")]
)
def test_names_of_other_libraries_are_understood(name, preset):
    with pytest.raises(ValueError, match=f"Did you mean '{preset}'"):
        mpjax.get_policy(name)
