"""FLOPs and bytes against counts by hand; planted faults, and healthy code."""

import inspect
import json

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import precision_healthy as healthy
from helpers.precision_faults import (
    FAULTS,
    FULL,
    HALF,
    INDEX,
    W32,
    X32,
    W,
    X,
    mixed_operands,
    struct,
)
from helpers.tools import thinned
from jax import lax, nn

import mpjax
from experiments.models.small import CASES
from mpjax.numerics import _findings as kinds
from mpjax.numerics._report import precision_report


def marked_line(fn):
    lines, start = inspect.getsourcelines(fn)
    (line,) = [start + i for i, text in enumerate(lines) if "# here" in text]
    return line


@pytest.mark.parametrize("jitted", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.fn.__name__)
def test_a_planted_fault_is_found(fault, jitted):
    fn = jax.jit(fault.fn) if jitted else fault.fn
    (found,) = precision_report(fn)(*fault.args).findings
    assert (found.kind, found.primitive) == (fault.kind, fault.primitive), str(found)
    assert found.source.startswith(f"precision_faults.py:{marked_line(fault.fn)}:"), (
        str(found)
    )
    assert (found.num_calls, found.flops) == (fault.num_calls, fault.flops)
    assert found.message
    assert str(found).endswith(found.remedy)
    assert len(found.remedy) > 20


def test_there_are_enough_of_each():
    for kind in (v for k, v in vars(kinds).items() if k.isupper() and k[0] != "_"):
        assert sum(fault.kind == kind for fault in FAULTS) >= 3, kind


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f.kind == kinds.RETRACE], ids=lambda f: f.fn.__name__
)
def test_a_retrace_is_one(fault):
    jitted = jax.jit(fault.fn)
    state, x = fault.args
    for _ in range(3):
        out = jitted(state, x)
        state = out[0] if isinstance(out, tuple) else out
    assert jitted._cache_size() > 1


def test_a_remedy_names_functions_that_exist():
    found = {f.fn.__name__: precision_report(f.fn)(*f.args).findings for f in FAULTS}
    assert "jnp.cumsum(x, dtype=" in found["cumulative_sum"][0].remedy
    assert "jnp.sum" in found["bias_gradient"][0].remedy
    (alone,) = precision_report(lambda x: lax.cumlogsumexp(x, 1))(X).findings
    assert "jnp.cumlogsumexp" not in alone.remedy


def test_a_leak_and_the_matmul_after_it():
    def f(x, w):
        with jax.named_scope("layer"):
            scaled = x * np.float32(0.1)
            return scaled @ w.astype(FULL)

    matmul, leak = precision_report(f)(X, W).findings
    assert (matmul.kind, leak.kind) == (kinds.FLOAT32_MATMUL, kinds.LEAK)
    assert matmul.scope == leak.scope == "layer"
    assert leak.source in matmul.message
    assert matmul.flops == 2 * 16 * 32 * 32


def test_forward_and_backward_of_a_matmul_are_one_finding():
    loss = lambda w, x: jnp.sum((x @ w) ** 2)
    (found,) = precision_report(jax.grad(loss, argnums=(0, 1)))(W32, X).findings
    # The third, cotangent times w, has two operands that are float32 by right.
    assert (found.num_calls, found.flops) == (2, 2 * 2 * 16 * 32 * 32)


def test_each_line_of_a_cached_jit_is_its_own():
    first = lambda x: jnp.where(x > 0, x, np.float32(1))
    second = lambda x: jnp.where(x > 0, x, np.float32(2))
    found = precision_report(lambda x: (first(x), second(x)))(X).findings
    line = inspect.getsourcelines(first)[1]
    assert [int(x.source.split(":")[1]) for x in found] == [line, line + 1]


@pytest.mark.parametrize("jitted", [False, True], ids=["", "jit"])
@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (healthy.softmax_in_float32, (X,)),
        (healthy.attention, (X, W, struct(32))),
        (healthy.attention_gradient, (X, W)),
        (healthy.rms_norm, (X, struct(32, dtype="float32"))),
        (healthy.rms_norm_gradient, (X, struct(32, dtype="float32"))),
        (healthy.scanned_residuals, (X, W)),
        (healthy.decayed, (X, W)),
        (healthy.float32_total, (X32, W)),
        (healthy.few_terms, (X, W)),
        (healthy.half_constants, (X, W)),
        (healthy.explicit_float32, (X, W)),
        (healthy.rounded_where_it_is_read_twice, (X, W)),
        (healthy.rounded_for_the_other_part, (X, W)),
        (healthy.behind_a_barrier, (X, W)),
        (healthy.unique_scatter, (X, W)),
        (healthy.accuracy, (X, W, INDEX)),
        (healthy.masked_accuracy, (X, W, INDEX)),
        (healthy.residual, (X, W)),
        (healthy.sampled, (X, W)),
        (healthy.sorted_by_integers, (X, W, INDEX)),
        (healthy.routed_in_float32, (X, W)),
        (healthy.distances_by_differences, (X, W)),
        (healthy.distances_in_float32, (X, W)),
        (healthy.penalty_and_product, (X, W)),
        (healthy.normed_residual, (X, W)),
        (lambda x: (jnp.cumsum(x), x @ x, x // 2), (INDEX,)),
        (lambda x: x @ jnp.arange(x.shape[-1]), (X32,)),
        (lambda: None, ()),
        (lambda: (), ()),
        (lambda lr, x: (lr * x).sum(), (0.1, X32)),
        (lambda batch: {"image": batch["image"] / 255.0}, ({"image": INDEX},)),
        (healthy.cast_tree, ({"w": X32, "n": INDEX},)),
        (healthy.weight_gradient, ({"w": W32}, X32)),
        (healthy.weight_gradient, ({"w": W32, "bias": 0.0}, X32)),
    ],
)
def test_healthy_functions(fn, args, jitted):
    findings = precision_report(jax.jit(fn) if jitted else fn)(*args).findings
    assert findings == (), "\n".join(map(str, findings))


@pytest.mark.parametrize("name", thinned(CASES))
def test_healthy_models(name):
    case = CASES[name]()
    grad = jax.value_and_grad(case.loss)
    inner = jax.value_and_grad(mpjax.autocast(case.loss, "mixed_float16"))
    for fn in (grad, mpjax.autocast(grad, "mixed_bfloat16"), inner):
        findings = precision_report(fn)(case.params, case.inputs).findings
        assert findings == (), "\n".join(map(str, findings))


@pytest.mark.parametrize("num_microbatches", [1, 16])
def test_a_healthy_train_step(num_microbatches):
    case = CASES["mlp"]()
    tx = mpjax.with_loss_scale(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    )
    state = mpjax.TrainState.create(params=case.params, tx=tx, ema=True)
    step = mpjax.make_train_step(
        lambda params, batch, key: (case.loss(params, batch), {}),
        tx,
        num_microbatches=num_microbatches,
        ema_decay=0.99,
    )
    report = precision_report(step)(state, case.inputs)
    assert report.findings == (), "\n".join(map(str, report.findings))
    assert report.flops_by_dtype()["float16"] > report.flops_by_dtype()["float32"]


def test_a_healthy_flax_model():
    class Block(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            x = flax.linen.LayerNorm(dtype=HALF)(x)
            return x + flax.linen.Dense(32, dtype=HALF)(x)

    params = jax.eval_shape(Block().init, jax.random.key(0), X)
    findings = precision_report(Block().apply)(params, X).findings
    assert findings == (), "\n".join(map(str, findings))


def test_float64_that_was_asked_for():
    with jax.enable_x64(True):
        wide = np.ones(3)
        assert precision_report(lambda x: x * 2 + np.ones(3))(wide).findings == ()
        weak = lambda x, lr: jnp.mean(x * 2.0) * np.float32(3) * lr
        assert precision_report(weak)(X32, 0.1).findings == ()


def test_flops_and_bytes_against_a_count_by_hand():
    def f(x, w, w32):
        with jax.named_scope("layer"):
            h = nn.relu(x @ w)
        with jax.named_scope("head"):
            y = h.astype(FULL) @ w32
            return jnp.sum(y)

    n, m = 16 * 32, 32 * 32
    report = precision_report(f)(X, W, W32)
    assert report.flops_by_scope() == {
        "layer": {"bfloat16": 2 * n * 32 + n},
        "head": {"float32": 2 * n * 32 + n},
    }
    # Matmul, relu and its literal; cast, matmul, sum.
    assert report.bytes_by_scope() == {
        "head": {"float32": (2 + 4) * n + 4 * (n + m + n) + 4 * (n + 1)},
        "layer": {"bfloat16": 2 * (n + m + n) + 2 * (n + n + 1)},
    }
    full, half = [r for r in report.records if r.primitive == "dot_general"]
    assert (half.dtype, half.scope, half.num_calls) == ("bfloat16", "layer", 1)
    assert (full.dtype, full.scope, full.flops) == ("float32", "head", 2 * n * 32)
    assert half.source.startswith("test_precision_report.py:")


def test_what_runs_often_counts_often_and_calls_count_nothing():
    def f(x, w, index):
        body = jax.checkpoint(lambda h, _: (nn.tanh(h @ w), h[0]))
        h, _ = jax.jit(lambda x: lax.scan(body, x, length=7))(x)
        h = lax.cond(index[0] > 0, lambda h: h * 2, lambda h: h, h)
        return h.at[index].add(x).reshape(-1)

    report = precision_report(f)(X, W, INDEX)
    by_name = {r.primitive: r for r in report.records}
    assert not {"jit", "scan", "cond", "remat2", "checkpoint"} & set(by_name)
    n, m = 16 * 32, 32 * 32
    assert (by_name["dot_general"].num_calls, by_name["tanh"].num_calls) == (7, 7)
    assert by_name["dot_general"].moved_bytes == 7 * 2 * (n + m + n)
    assert by_name["tanh"].flops == 7 * n
    assert by_name["mul"].flops == n
    assert by_name["scatter-add"].moved_bytes == 2 * (n + n + n) + 4 * 16
    assert by_name["reshape"].moved_bytes == 0
    assert "add" not in {r.primitive for r in report.records if r.dtype == "bfloat16"}
    assert by_name["gt"].dtype == "int32" or by_name["gt"].dtype == "bool"
    assert by_name["gt"].flops == 0


def test_dtype_of_a_mixed_matmul_and_of_a_comparison():
    report = precision_report(lambda x, w: (x @ w, x > 0))(X, W32)
    by_name = {r.primitive: r.dtype for r in report.records}
    assert by_name == {"dot_general": "float32", "gt": "bfloat16"}
    wide = lambda x, w: jnp.matmul(x, w, preferred_element_type=FULL)
    assert precision_report(wide)(X, W).flops_by_dtype() == {"bfloat16": 2**15}


def test_the_same_flops_as_autocast_report():
    case = CASES["convnet"]()
    grad = jax.value_and_grad(case.loss)
    expected = mpjax.autocast_report(grad, "float32")(case.params, case.inputs)
    report = precision_report(grad)(case.params, case.inputs)
    assert report.flops_by_dtype()["float32"] == expected.flops_by_dtype()["float32"]


def test_data_goes_through_json_and_nothing_is_computed():
    def f(x):
        jax.debug.callback(lambda _: pytest.fail("computed"), x)
        return x * np.float32(2)

    data = json.loads(json.dumps(precision_report(f)(X).to_dict()))
    assert data["flops_by_dtype"]["float32"] == 16 * 32
    assert data["findings"][0]["kind"] == kinds.LEAK
    assert {"primitive", "dtype", "moved_bytes"} <= set(data["records"][0])


def test_plain_table_and_rich_table(capsys):
    rich_console = pytest.importorskip("rich.console")
    report = precision_report(mixed_operands)(X, W32)
    report.print()
    plain = capsys.readouterr().out
    assert plain == f"{report}\n"
    flops, moved, header, rule, row, count, finding = plain.splitlines()
    assert flops == "float32 0.0328 MFLOP (100.0 %)"
    assert moved.startswith("float32")
    assert header.split() == ["scope", "dtype", "MFLOP", "MB", "calls"]
    assert set(rule) == {"-", " "}
    assert row.split()[:2] == ["float32", "0.0328"]
    assert count == "1 found:"
    assert finding == f"- {report.findings[0]}"
    assert "\x1b" not in plain
    console = rich_console.Console(width=200, force_terminal=True)
    with console.capture() as captured:
        console.print(report)
    assert "matmul in float32" in captured.get()
    assert "\x1b" in captured.get()


def test_an_empty_report():
    report = precision_report(lambda x: x)(3)
    assert (report.records, report.findings) == ((), ())
    assert report.flops_by_dtype() == report.bytes_by_scope() == {}
    assert "no floating-point" in str(report)
    assert "nothing found" in str(report)


def test_a_module_is_refused():
    model = flax.nnx.Linear(3, 3, rngs=flax.nnx.Rngs(0))
    with pytest.raises(TypeError, match="expected arrays, got the NNX object Linear"):
        precision_report(lambda m, x: m(x))(model, np.ones((1, 3)))


def test_inside_jit_it_sees_shapes():
    reports = []

    @jax.jit
    def f(x):
        reports.append(precision_report(lambda y: y * jnp.sum(x) * np.float32(2))(x))
        return x

    f(jnp.ones((16, 32), HALF))
    assert [x.kind for x in reports[0].findings] == [kinds.LEAK]
