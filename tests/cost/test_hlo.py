"""Bytes moved, counted in HLO written by hand."""

import json
import os
import subprocess
import sys

import pytest

from mpjax.cost._hlo import moved_bytes

# A loop of 5 steps over two stacks of 5 slices, of 256 bytes and of 128.
LOOP = """\
HloModule loop

%pair (...) -> (...) {
  %a = f32[5,64] parameter(0)
  %b = bf16[5,64] parameter(1)
  %c = f32[64] parameter(2)
  %i = s32[] parameter(3)
  %zero = s32[] constant(0)
  %view = f32[1,64] bitcast(%c)
  %first = f32[5,64] dynamic-update-slice(%a, %view, %i, %zero)
  %half = bf16[1,64] convert(%view)
  %stack = bf16[5,1,64] bitcast(%b)
  %piece = bf16[1,1,64] bitcast(%half)
  %second = bf16[5,1,64] dynamic-update-slice(%stack, %piece, %i, %zero, %zero)
  %back = bf16[5,64] bitcast(%second)
  ROOT %both = (f32[5,64], bf16[5,64]) tuple(%first, %back)
}

%body (...) -> (...) {
  %arg = (f32[5,64], bf16[5,64], f32[64], s32[]) parameter(0)
  %a.1 = f32[5,64] get-tuple-element(%arg), index=0
  %b.1 = bf16[5,64] get-tuple-element(%arg), index=1
  %c.1 = f32[64] get-tuple-element(%arg), index=2
  %i.1 = s32[] get-tuple-element(%arg), index=3
  FUSION
  %x = f32[5,64] get-tuple-element(%done), index=0
  %y = bf16[5,64] get-tuple-element(%done), index=1
  ROOT %out = (f32[5,64], bf16[5,64], f32[64], s32[]) tuple(%x, %y, %c.1, %i.1)
}

ENTRY %main (...) -> (...) {
  %in = (f32[5,64], bf16[5,64], f32[64], s32[]) parameter(0)
  ROOT %loop = (f32[5,64], bf16[5,64], f32[64], s32[]) while(%in), body=%body, TRIPS
}
"""
TRIPS = 'backend_config={"known_trip_count":{"n":"5"}}'
RESULTS = "(f32[5,64], bf16[5,64])"
OPERANDS = "%a.1, %b.1, %c.1, %i.1"
STARTED = f"((f32[5,64], bf16[5,64], f32[64], s32[]), {RESULTS}, u32[])"
FUSIONS = {
    "at once": f"%done = {RESULTS} fusion({OPERANDS}), kind=kLoop, calls=%pair",
    "asynchronous": f"""\
  %start = {STARTED} fusion-start({OPERANDS}), kind=kLoop, calls=%pair
  %done = {RESULTS} fusion-done(%start)""",
}


@pytest.mark.parametrize("form", FUSIONS)
def test_a_fusion_moves_only_its_slices_of_stacks(form):
    """Each step reads a slice and its index, and writes the slice and its half."""
    text = LOOP.replace("FUSION", FUSIONS[form]).replace("TRIPS", TRIPS)
    assert moved_bytes(text) == 5 * (256 + 4 + 256 + 128)


# A table of 100 rows of 8 floats, of which a fusion takes 10 rows; and its operands.
TABLE = """\
HloModule table

%add (...) -> (...) {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%halve (...) -> (...) {
  %whole = f32[100,8] parameter(0)
  ROOT %half = bf16[100,8] convert(%whole)
}

%rows (...) -> (...) {
  %half = bf16[100,8] parameter(0)
  %at = s32[10] parameter(1)
  ROOT %taken = bf16[10,8] gather(%half, %at), slice_sizes={1,8}
}

%fused (...) -> (...) {
  %table = f32[100,8] parameter(0)
  %ids = s32[10] parameter(1)
  %news = f32[10,8] parameter(2)
  %scalar = f32[] constant(2)
  %two = f32[100,8] broadcast(%scalar), dimensions={}
  BODY
}

ENTRY %main (...) -> (...) {
  %t = f32[100,8] parameter(0)
  %i = s32[10] parameter(1)
  %n = f32[10,8] parameter(2)
  ROOT %out = RESULT fusion(%t, %i, %n), kind=kLoop, calls=%fused
}
"""
IDS, ROWS, HALF_ROWS, WHOLE = 4 * 10, 4 * 80, 2 * 80, 4 * 800
CAST = "%c = bf16[100,8] convert(%table)"
GATHER = "gather({}, %ids), slice_sizes={{1,8}}"
BODIES = {
    "cast": (
        f"{CAST}\n  ROOT %g = bf16[10,8] {GATHER.format('%c')}",
        ROWS + IDS + HALF_ROWS,
    ),
    "arithmetic, cast, transposition": (
        """%m = f32[100,8] multiply(%table, %two)
  %c = bf16[100,8] convert(%m)
  %t = bf16[8,100] transpose(%c), dimensions={1,0}
  ROOT %s = bf16[8,10] slice(%t), slice={[0:8], [0:10]}""",
        ROWS + HALF_ROWS,
    ),
    "calls": (
        """%c = bf16[100,8] fusion(%table), kind=kLoop, calls=%halve
  ROOT %g = bf16[10,8] call(%c, %ids), to_apply=%rows""",
        ROWS + IDS + HALF_ROWS,
    ),
    "more rows than the table has": (
        f"""{CAST}
  %many = s32[990] broadcast(%ids), dimensions={{}}
  ROOT %g = bf16[990,8] gather(%c, %many), slice_sizes={{1,8}}""",
        WHOLE + IDS + 2 * 990 * 8,
    ),
    "slice and all": (
        f"""{CAST}
  %g = bf16[10,8] {GATHER.format("%c")}
  ROOT %both = (bf16[10,8], bf16[100,8]) tuple(%g, %c)""",
        WHOLE + IDS + HALF_ROWS + WHOLE // 2,
    ),
    "slice and sum": (
        f"""%zero = f32[] constant(0)
  %g = f32[10,8] {GATHER.format("%table")}
  %s = f32[8] reduce(%table, %zero), dimensions={{0}}, to_apply=%add
  ROOT %both = (f32[10,8], f32[8]) tuple(%g, %s)""",
        WHOLE + IDS + ROWS + 4 * 8,
    ),
    "sum of a cast": (
        f"{CAST}\n  ROOT %s = bf16[8] reduce(%c, %scalar), dimensions={{0}}",
        WHOLE + 2 * 8,
    ),
    "scatter in place": (
        """%half = bf16[10,8] convert(%news)
  %full = f32[10,8] convert(%half)
  ROOT %s = f32[100,8] scatter(%table, %ids, %full), to_apply=%add""",
        ROWS + IDS + ROWS + ROWS,
    ),
    "scatter into a copy": (
        """%s = f32[100,8] scatter(%table, %ids, %news), to_apply=%add
  ROOT %c = bf16[100,8] convert(%s)""",
        WHOLE + IDS + ROWS + WHOLE // 2,
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_fusion_moves_what_it_takes_of_a_table(name):
    body, expected = BODIES[name]
    root = next(line for line in body.splitlines() if "ROOT" in line)
    result = root.partition(" = ")[2]
    end = result.index(")") + 1 if result.startswith("(") else result.index(" ")
    text = TABLE.replace("BODY", body).replace("RESULT", result[:end])
    assert moved_bytes(text) == expected


@pytest.mark.parametrize(
    ("kernel", "result", "expected"),
    [
        ("gather(%t, %i), slice_sizes={1,8}", "f32[10,8]", ROWS + IDS + ROWS),
        ("scatter(%t, %i, %n), to_apply=%add", "f32[100,8]", 3 * ROWS + IDS),
    ],
)
def test_kernels_outside_of_a_fusion(kernel, result, expected):
    fusion = "RESULT fusion(%t, %i, %n), kind=kLoop, calls=%fused"
    assert moved_bytes(TABLE.replace(fusion, f"{result} {kernel}")) == expected


ON_A_GPU = """
import json, jax, jax.numpy as jnp
from mpjax.cost import analyze
table = jax.ShapeDtypeStruct((100_000, 128), jnp.float32)
ids = jax.ShapeDtypeStruct((8192,), jnp.int32)
take = lambda t, i: jnp.take(t.astype(jnp.bfloat16), i, axis=0)
print(json.dumps(analyze(take, table, ids, device="h100").moved_bytes))
"""


@pytest.mark.h100
def test_a_gather_from_a_cast_table_on_an_h100():
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    taken = 8192 * 128
    assert json.loads(done.stdout) == pytest.approx(6 * taken + 4 * 8192, rel=0.01)
