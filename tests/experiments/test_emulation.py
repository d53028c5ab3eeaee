"""What a run says of half precision that its hardware emulates."""

import json
import re

import jax
import pytest

from experiments.harness import results
from experiments.harness.config import PRESETS, BaseConfig, matmul_dtype
from experiments.harness.emulation import Hardware, emulation_note, float8_note

AVX2 = ("sse2", "avx2")
BF16 = (*AVX2, "avx512f", "avx512_bf16")
AMX = (*AVX2, "amx_bf16")
HALVES = {
    "float32": "float32",
    "mixed_float16": "float16",
    "mixed_bfloat16": "bfloat16",
}


@pytest.mark.parametrize(
    ("hardware", "policies", "words"),
    [
        (Hardware("cpu", AVX2), "mixed_float16, mixed_bfloat16", "from either"),
        (Hardware("cpu", BF16), "mixed_float16", "--policy mixed_bfloat16 is the half"),
        (Hardware("cpu", AMX), "mixed_float16", "--policy mixed_bfloat16 is the half"),
        (
            Hardware("cpu", BF16, jax_version=(0, 10, 2)),
            "mixed_float16, mixed_bfloat16",
            "jax 0.10.2 emulates .* jax 0.12 or later computes in bfloat16",
        ),
        (
            Hardware("cpu", AVX2, jax_version=(0, 10, 2)),
            "mixed_float16, mixed_bfloat16",
            "this CPU emulates float16 and bfloat16",
        ),
        (Hardware("cpu"), "mixed_float16", "XLA emulates float16 on CPUs"),
        (
            Hardware("gpu", AVX2, "7.5"),
            "mixed_bfloat16",
            r"compute capability 7\.5.* emulates bfloat16.* --policy mixed_float16 is",
        ),
        (Hardware("gpu", AVX2, "7.0"), "mixed_bfloat16", "--policy mixed_float16 is"),
        (
            Hardware("gpu", AVX2, "6.1"),
            "mixed_float16, mixed_bfloat16",
            "no Tensor Cores",
        ),
        (Hardware("tpu"), "mixed_float16", "computes in bfloat16"),
    ],
)
def test_policies_that_are_emulated_are_named_with_what_pays(hardware, policies, words):
    note = emulation_note(hardware, HALVES)
    assert note is not None
    assert note.startswith(f"{policies}: ")
    assert "\n" not in note
    assert re.search(words, note), note
    assert emulation_note(hardware, {"float32": "float32"}) is None


@pytest.mark.parametrize(
    ("hardware", "dtype"),
    [
        (Hardware("cpu", BF16), "bfloat16"),
        (Hardware("cpu"), "bfloat16"),
        (Hardware("gpu", AVX2, "7.5"), "float16"),
        (Hardware("gpu", AVX2, "8.0"), "bfloat16"),
        (Hardware("gpu", AVX2, "9.0"), "float16"),
        (Hardware("gpu", AVX2, "12.0"), "float16"),
        (Hardware("gpu", AVX2, "gfx942"), "float16"),
        (Hardware("gpu"), "float16"),
        (Hardware("tpu"), "bfloat16"),
        (Hardware("cpu", AVX2), "float64"),
    ],
)
def test_nothing_is_said_where_nothing_is_off(hardware, dtype):
    assert emulation_note(hardware, {"some_policy": dtype}) is None


def test_policies_in_float8_are_named_where_it_is_emulated():
    dtypes = {name: matmul_dtype(name) for name in PRESETS if name != "float64"}
    assert emulation_note(Hardware("cpu", AMX), dtypes) is not None
    for platform in ("cpu", "gpu", "tpu"):
        note = float8_note(Hardware(platform), dtypes)
        assert note is not None
        start = f"mixed_float8, mixed_float8:all: this {platform.upper()} emulates"
        assert note.startswith(start)
    assert float8_note(Hardware("gpu", has_float8=True), dtypes) is None
    assert float8_note(Hardware("cpu"), HALVES) is None


def test_this_machine_is_described():
    hardware = results.hardware()
    assert hardware.platform == jax.devices()[0].platform
    assert hardware.jax_version == jax.__version_info__
    assert not (hardware.platform == "cpu" and hardware.has_float8)
    assert all(" " not in flag for flag in hardware.cpu_flags)


def test_a_run_says_it_once_and_keeps_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(results, "hardware", lambda: Hardware("cpu", AVX2))
    train_one = lambda config, policy, directory: {"policy": policy}
    config = BaseConfig(policies="float32,p=f32,c=f16,o=f32", workdir=tmp_path / "run")
    results.run_policies("tiny", config, train_one)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
    assert len(lines) == 1
    assert lines[0].startswith("note: p=f32,c=f16,o=f32: this CPU emulates float16")
    written = json.loads((tmp_path / "run/result.json").read_text())
    assert written["environment"]["notes"] == [lines[0].removeprefix("note: ")]
    only = BaseConfig(policy="float32", workdir=tmp_path / "other")
    result = results.run_policies("tiny", only, train_one)
    assert result.environment["notes"] == []
    assert "note" not in capsys.readouterr().out
