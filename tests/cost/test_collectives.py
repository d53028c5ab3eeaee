"""Bytes sent from device to device, counted in HLO written by hand."""

import dataclasses
import functools

import numpy as np
import pytest
from jax.sharding import Mesh

from mpjax import cost
from mpjax.cost._collectives import find_collectives
from mpjax.cost._hlo import moved_bytes

H100 = cost.get_device("h100")
KB = 1024
COLUMN = "{{0,4},{1,5},{2,6},{3,7}}"
ROW = "{{0,1,2,3},{4,5,6,7}}"

MODULE = """\
HloModule step, is_scheduled=true, num_partitions={num_devices}

%add (...) -> (...) {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}
{computations}
ENTRY %main (...) -> (...) {{
  %a = f32[256] parameter(0)
  %b = bf16[256] parameter(1)
  %i = s32[] parameter(2)
  {body}
}}
"""


@dataclasses.dataclass(frozen=True)
class Numbered:
    """All that a count needs of a device."""

    id: int


def mesh_of(ids=range(8), **axes):
    devices = np.array([Numbered(i) for i in ids])
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


def collectives(body, mesh, device=H100, computations=""):
    text = MODULE.format(num_devices=mesh.size, body=body, computations=computations)
    return find_collectives(text, device, mesh)


def all_reduce(groups, operand="%a"):
    return (
        f"ROOT %r = f32[256] all-reduce({operand}), channel_id=1, replica_groups="
        f"{groups}, use_global_device_ids=true, to_apply=%add"
    )


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("f32[256] all-reduce(%a)", 2 * 3 * KB // 4),
        ("f32[1024] all-gather(%a)", 3 * KB),
        ("f32[64] reduce-scatter(%a)", 3 * KB // 4),
        ("f32[256] all-to-all(%a)", 3 * KB // 4),
    ],
)
def test_bytes_by_the_ring_algorithm(instruction, expected):
    body = f"ROOT %r = {instruction}, replica_groups={ROW}, dimensions={{0}}"
    (found,) = collectives(body, mesh_of(data=2, fsdp=4))
    assert f" {found.name}(" in instruction
    assert (found.axes, found.group_size, found.num_calls) == (("fsdp",), 4, 1)
    assert (found.dtype, found.sent_bytes) == ("float32", expected)


PERMUTE = "ROOT %r = f32[256] collective-permute(%a), source_target_pairs={}"


def test_a_permutation_sends_its_array():
    (found,) = collectives(PERMUTE.format("{{0,0},{1,5},{5,1}}"), mesh_of(a=2, b=4))
    assert (found.axes, found.group_size, found.sent_bytes) == (("a",), 2, KB)
    assert collectives(PERMUTE.format("{{0,0},{1,1}}"), mesh_of(a=2, b=4)) == ()


@pytest.mark.parametrize(
    ("groups", "axes", "group_size"),
    [
        (COLUMN, ("data",), 2),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("mesh['data'=2,'fsdp'=4] {'data'}", ("data",), 2),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", ("data",), 2),
        ("mesh['x'=4,'y'=2], device_ids=(0,4,1,5,2,6,3,7) {'y'}", ("data",), 2),
        (ROW, ("fsdp",), 4),
        ("[2,4]<=[8]", ("fsdp",), 4),
        ("mesh['x'=8] {'x':(2)4}", ("fsdp",), 4),
        ("mesh['x'=8] {'x':(1)2}", ("data",), 2),
        ("mesh['x'=2,'y'=4] {'y':(2)2}", ("fsdp",), 2),
        ("[1,8]<=[8]", ("data", "fsdp"), 8),
        ("{}", ("data", "fsdp"), 8),
        ("mesh['x'=2,'y'=4] {'y','x'}", ("data", "fsdp"), 8),
    ],
)
def test_the_axes_of_groups_in_every_form(groups, axes, group_size):
    (found,) = collectives(all_reduce(groups), mesh_of(data=2, fsdp=4))
    assert (found.axes, found.group_size) == (axes, group_size)
    assert found.sent_bytes == 2 * (group_size - 1) * KB // group_size


def test_groups_of_one_device_send_nothing():
    singles = "{{0},{1},{2},{3},{4},{5},{6},{7}}"
    assert collectives(all_reduce(singles), mesh_of(data=8)) == ()


def test_iota_groups_of_512_devices():
    along = functools.partial(collectives, mesh=mesh_of(range(512), data=64, fsdp=8))
    (rows,) = along(all_reduce("[64,8]<=[512]"))
    (columns,) = along(all_reduce("[8,64]<=[64,8]T(1,0)"))
    assert (rows.axes, rows.is_within_node) == (("fsdp",), True)
    assert (columns.axes, columns.is_within_node) == (("data",), False)
    assert rows.seconds == pytest.approx(2 * 7 / 8 * KB / 450e9)
    assert columns.seconds == pytest.approx(2 * 63 / 64 * KB / 50e9)


def test_devices_of_a_node_share_a_rings_hop_to_the_next_node():
    """A ring through two whole nodes has 8 x 50 GB/s to leave each."""
    mesh = mesh_of(range(16), fsdp=16)
    (ring,) = collectives(all_reduce("{}"), mesh)
    assert ring.seconds == pytest.approx(2 * 15 / 16 * KB / 400e9)
    exchange = "ROOT %r = f32[256] all-to-all(%a), replica_groups={}"
    (direct,) = collectives(exchange, mesh)
    assert direct.seconds == pytest.approx(15 / 16 * KB / 50e9)


def test_the_order_of_a_meshs_devices_says_what_a_node_is():
    """Every second device of two nodes, then the others."""
    mesh = mesh_of([*range(0, 16, 2), *range(1, 16, 2)], data=4, fsdp=4)
    (found,) = collectives(all_reduce("[4,4]<=[16]"), mesh)
    assert (found.axes, found.is_within_node) == (("fsdp",), True)
    (found,) = collectives(all_reduce("[4,4]<=[4,4]T(1,0)"), mesh)
    assert (found.axes, found.is_within_node) == (("data",), False)


def test_without_nodes_there_is_no_time():
    mesh = mesh_of(data=8)
    (found,) = collectives(all_reduce("{}"), mesh, cost.Device("unknown"))
    assert (found.is_within_node, found.seconds) == (None, None)


PAIRS = {
    "at once": f"ROOT %r = (f32[1024], bf16[1024]) all-gather(%a, %b), "
    f"replica_groups={ROW}, dimensions={{0}}",
    "asynchronous": f"""\
%s = ((f32[256], bf16[256]), (f32[1024], bf16[1024])) all-gather-start(%a, %b), \
replica_groups={ROW}, dimensions={{0}}
  ROOT %r = (f32[1024], bf16[1024]) all-gather-done(%s)""",
    "in a computation of its own": """\
%s = ((f32[256], bf16[256]), (f32[1024], bf16[1024]), u32[]) async-start(%a, %b), \
calls=%wrapped
  ROOT %r = (f32[1024], bf16[1024]) async-done(%s)""",
}
WRAPPED = f"""
%wrapped (...) -> (...) {{
  %p = f32[256] parameter(0)
  %q = bf16[256] parameter(1)
  ROOT %g = (f32[1024], bf16[1024]) all-gather(%p, %q), replica_groups={ROW}
}}
"""


@pytest.mark.parametrize("form", PAIRS)
def test_tuples_and_asynchronous_pairs_count_once(form):
    mesh = mesh_of(data=2, fsdp=4)
    computations = WRAPPED if "own" in form else ""
    full, half = collectives(PAIRS[form], mesh, computations=computations)
    assert (full.dtype, full.sent_bytes, full.num_calls) == ("float32", 3 * KB, 1)
    assert (half.dtype, half.sent_bytes, half.num_calls) == ("bfloat16", 3 * KB // 2, 1)
    # What a collective reads and writes in memory: its operands and its results.
    text = MODULE.format(num_devices=8, body=PAIRS[form], computations=computations)
    assert moved_bytes(text) == 5 * (KB + KB // 2)


LOOP = f"""
%body (...) -> (...) {{
  %p = f32[256] parameter(0)
  ROOT %g = f32[256] all-reduce(%p), replica_groups={COLUMN}, to_apply=%add
}}
%twice (...) -> (...) {{
  %p = f32[256] parameter(0)
  %g = f32[512] all-gather(%p), replica_groups={COLUMN}
  ROOT %h = f32[256] reduce-scatter(%g), replica_groups={COLUMN}, to_apply=%add
}}
"""
WHILE = "while(%a), body=%body"


@pytest.mark.parametrize(
    ("instruction", "num_calls", "sent_bytes"),
    [
        (f'{WHILE}, backend_config={{"known_trip_count":{{"n":"24"}}}}', 24, 24 * KB),
        (WHILE, 1, KB),
        ("call(%a), to_apply=%body", 1, KB),
        ("conditional(%i, %a, %a), branch_computations={%body, %twice}", 2, 2 * KB),
    ],
)
def test_loops_calls_and_branches(instruction, num_calls, sent_bytes):
    body = f"ROOT %r = f32[256] {instruction}"
    found = collectives(body, mesh_of(data=2, fsdp=4), computations=LOOP)
    assert sum(c.num_calls for c in found) == num_calls
    assert sum(c.sent_bytes for c in found) == sent_bytes
