"""README.md is true: its programs run, and its tables match the result files."""

import json
import re
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers.tools import thinned

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
PROSE = " ".join(README.read_text().split())  # wherever its lines break
NAMES = ["loop", "autocast", "linen", "nnx", "equinox", "haiku", "numerics", "cost"]
FRAMEWORKS = NAMES[2:6]


def run(name):
    namespace = {}
    exec(compile(BLOCKS[NAMES.index(name)], f"README:{name}", "exec"), namespace)
    return namespace


def test_there_is_a_name_for_each_program():
    assert len(BLOCKS) == len(NAMES)


def test_the_loop_learns_and_is_short(capsys):
    namespace = run("loop")
    assert jnp.allclose(namespace["params"]["w"], 1, atol=1e-2)
    assert "32768" in capsys.readouterr().out
    lines = [line for line in BLOCKS[0].splitlines() if line and line[0] != "#"]
    assert len(lines) <= 20
    assert sum("# 1:" in line or "# 2:" in line for line in lines) == 2


def test_autocast_and_its_report(capsys):
    namespace = run("autocast")
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(namespace["grads"]))
    assert "a rule says float32" in capsys.readouterr().out
    dots = [r for r in namespace["report"].records if r.primitive == "dot_general"]
    assert {(r.scope, r.dtype) for r in dots} == {
        ("body", "bfloat16"),
        ("head", "float32"),
    }


@pytest.mark.slow
def test_numerics_says_what_the_text_says(capsys):
    namespace = run("numerics")
    out = capsys.readouterr().out
    assert "becomes zero in float16" in out
    assert int(namespace["histograms"]["encoder/dot_general"].cotangents.num_values)
    assert namespace["found"].primitive == "log"
    assert namespace["found"].source.startswith("README:numerics:")
    assert not namespace["report"].findings


def test_cost_compares_the_policies(capsys):
    namespace = run("cost")
    assert namespace["report"].temporary_bytes > 0
    assert list(namespace["costs"].reports) == ["float32", "mixed_bfloat16"]
    assert "mixed_bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("name", thinned(FRAMEWORKS, 4, rest="slow"))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_train_step_learns_in_each_framework(name):
    namespace = run(name)
    state, metrics = namespace["state"], namespace["metrics"]
    assert int(state.step) + int(metrics["num_skipped"]) == 20
    assert int(metrics["num_skipped"]) <= 5
    assert float(metrics["loss"]) < {"linen": 2.0}.get(name, 0.5)
    if state.model_state is not None:
        leaves = jax.tree.leaves(state.model_state)
        stats = [x for x in leaves if x.dtype == jnp.float32]
        assert stats
        assert all(bool(jnp.isfinite(x).all()) for x in stats)


def test_the_tables_are_those_of_the_result_files():
    from experiments import tables

    text = README.read_text()
    assert len(tables.TABLE.findall(text)) >= 3
    assert tables.render(text) == text


@pytest.mark.parametrize(
    ("own", "reference"),
    [("mpjax, bfloat16", "mpjax, float32"), ("jmp, bfloat16", "by hand, float32")],
)
def test_how_much_longer_bfloat16_takes_without_its_instructions(own, reference):
    """The text's numbers: medians over rounds of the ratio within a round."""
    said = PROSE.partition("step in float32, its bfloat16 steps take")[2]
    said = said.split("cast by hand")
    expected = []
    for workload in ("mlp", "transformer_block", "transformer", "convnet", "bigru"):
        file = f"speed_{workload}_cpu_avx2_jax0.12.0.1.json"
        runs = json.loads((README.parent / "experiments/results" / file).read_text())
        times = {run["name"]: run["times_ms"] for run in runs["runs"]}
        pairs = zip(times[own], times[reference], strict=True)
        expected.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
    assert re.findall(r"\d\.\d\d", said["jmp" in own])[:5] == expected
