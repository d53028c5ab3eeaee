"""README.md is true: its diff, its tables, its links, and what it says of peers."""

import json
import re
import statistics
from pathlib import Path

import jax.numpy as jnp
import pytest
import test_peers

import mpjax
from experiments import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 250


LOOP = """
for _ in range(300):
    params, opt_state, metrics = step(params, opt_state, x, y)
"""


def test_the_diff_adds_three_lines_and_both_loops_learn():
    diff = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1].splitlines()
    changed = [line for line in diff if line[:1] in "+-"]
    added = [line for line in changed if line[:1] == "+" and "import" not in line]
    assert len(added) == 3
    results = {}
    for sign in "-+":
        kept = [line[1:] for line in diff if line[:1] not in {"+", "-"} - {sign}]
        namespace: dict = {}
        exec(compile("\n".join(kept), f"README:diff{sign}", "exec"), namespace)
        exec(LOOP, namespace)
        results[sign] = namespace
        assert jnp.allclose(namespace["params"]["w"], 1, atol=1e-2)
    old, new = (float(results[sign]["metrics"]["loss"]) for sign in "-+")
    assert new == pytest.approx(old, abs=1e-4)  # the true loss, not the scaled one
    assert mpjax.loss_scale_state(results["+"]["opt_state"]).num_skipped == 0


PEERS = ("mpjax", "jmp", "flax", "mpx", "keras", "torch")
TESTED = ("Limits", "PythonFloat", "StaticScales", "Growth", "Labels", "NoFloor")
TESTED += ("ModelState", "OtherLeaves")


def test_each_cross_of_the_table_of_peers_is_a_test():
    table = README.partition("## What peers get wrong")[2].partition("\n\n`optax")[0]
    rows = [line for line in table.splitlines() if "✓" in line]
    assert len(rows) == len(TESTED)
    for row, name in zip(rows, TESTED, strict=True):
        (found,) = (
            c for n, c in vars(test_peers).items() if n.startswith(f"Test{name}")
        )
        tests = {n.split("_")[1] for n in dir(found) if n.startswith("test_")}
        marks = [cell.strip() for cell in row.split("|")[2:-1]]
        assert marks[0] == "✓"
        assert "mpjax" in tests
        crossed = {p for p, mark in zip(PEERS, marks, strict=True) if mark == "✗"}
        assert crossed == tests & set(PEERS[1:]), row


def test_the_tables_of_all_pages_are_those_of_the_result_files():
    num_tables = 0
    for page in tables.pages():
        text = page.read_text()
        num_tables += len(tables.TABLE.findall(text))
        assert tables.render(text) == text, page
    assert num_tables >= 15


def test_the_encoders_of_the_speech_page_are_those_of_the_result_files():
    page = (ROOT / "docs/results/speech.md").read_text()
    rows = re.findall(
        r"^\| (\w+)[^|]*\| ([\d,]+) \| ([\d.]+) % \|$", page, re.MULTILINE
    )
    assert len(rows) == 4
    for encoder, parameters, cer in rows:
        name = "speech_ctc" if encoder == "bigru" else f"speech_ctc_{encoder}"
        run = json.loads((tables.RESULTS / f"{name}.json").read_text())["runs"][0]
        assert (run["encoder"], run["policy"]) == (encoder, "float32")
        assert f"{run['num_parameters']:,}" == parameters
        assert f"{100 * run['test_cer']:.1f}" == cer


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 20
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link


@pytest.mark.parametrize(
    ("own", "reference"),
    [("mpjax, bfloat16", "mpjax, float32"), ("jmp, bfloat16", "by hand, float32")],
)
def test_how_much_longer_bfloat16_takes_without_its_instructions(own, reference):
    """The numbers of docs/results/speed.md: medians of the ratio within a round."""
    prose = " ".join((ROOT / "docs/results/speed.md").read_text().split())
    said = prose.partition("step in float32, its bfloat16 steps take")[2]
    said = said.split("cast by hand")
    expected = []
    workloads = "mlp", "transformer_block", "transformer", "convnet", "bigru", "speech"
    for workload in workloads:
        file = tables.RESULTS / f"speed_{workload}_cpu_avx2_jax0.12.0.1.json"
        runs = json.loads(file.read_text())["runs"]
        times = {run["name"]: run["times_ms"] for run in runs}
        pairs = zip(times[own], times[reference], strict=True)
        expected.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
    assert re.findall(r"\d\.\d\d", said["jmp" in own])[:6] == expected
