"""Bytes moved, counted in HLO written by hand."""

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
