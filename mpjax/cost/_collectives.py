"""Bytes that compiled code sends from device to device, read from its HLO."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from mpjax.cost._devices import Device
from mpjax.cost._hlo import control_flow, parse

# What each of n devices sends by the ring algorithm, in sizes of its own operand.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_RINGS = ("all-reduce", "all-gather", "reduce-scatter")

# Three ways to write groups: lists {{0,1},{2,3}}, reshaped numbers [2,2]<=[2,2]T(1,0),
# and axes of a mesh, or parts of axes: mesh['a'=2,'b'=4] {'a','b':(2)2}.
_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)="
    r"(?:\{(?P<lists>(?:\{[\d,]*\},?)*)\}"
    r"|\[(?P<shape>[\d,]+)\]<=(?P<numbers>\[[\d,]+\](?:T\([\d,]+\))?)"
    r"|mesh\[(?P<mesh>[^\]]*)\](?:, device_ids=\((?P<ids>.*?)\))? \{(?P<parts>[^}]*)\})"
)
_LIST = re.compile(r"\{([\d,]*)\}")
_RESHAPED = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'([^']*)'=(\d+)")
_AXIS_PART = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
_NUM_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
_DTYPE = re.compile(r"([fsuc])(\d+)(\w*)")
_KINDS = {"f": "float", "s": "int", "u": "uint", "c": "complex"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of a step that are alike, all together, as each device has them.

    Attributes:
      name: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or
        "collective-permute".
      dtype: dtype of what is sent.
      axes: names of the mesh axes along which the devices of a group differ; empty if
        the mesh is unknown.
      group_size: number N of devices in a group; 2 for a permutation, of pairs.
      num_calls: how often they run; several arrays in one call count each.
      sent_bytes: what a device sends by the ring algorithm: 2 (N - 1) / N of an array
        for an all-reduce, (N - 1) / N of the whole array for an all-gather, a
        reduce-scatter and an all-to-all, all of it for a permutation.
      is_within_node: whether no group has devices of several nodes; None if the size of
        a node is unknown.
      seconds: modelled time, `sent_bytes` at full bandwidth; None if that is unknown.
    """

    name: str
    dtype: str
    axes: tuple[str, ...]
    group_size: int
    num_calls: int
    sent_bytes: int
    is_within_node: bool | None
    seconds: float | None


class _Route(NamedTuple):
    """Which devices a collective connects, and how fast."""

    axes: tuple[str, ...]
    group_size: int
    is_within_node: bool | None
    bytes_per_s: float | None


def find_collectives(
    text: str, device: Device, mesh: Mesh | None
) -> tuple[Collective, ...]:
    """Returns what a device sends while a compiled module runs once, the most first.

    A loop counts times its trip count if XLA knows it, else once; a conditional counts
    the branch with the most bytes.

    Args:
      text: `compiled.as_text()`.
      device: what every device of the mesh is like.
      mesh: the devices in the order in which the module numbers them; None if unknown.
    """
    computations, entry = parse(text)
    partitions = _NUM_PARTITIONS.search(text)
    num_devices = int(partitions[1]) if partitions else 1
    if mesh is not None and mesh.size != num_devices:
        mesh = None
    totals: dict[Any, np.ndarray] = {}
    for (name, dtype, groups), counts in _count(computations, entry).items():
        route = _route(name, _read_groups(groups, num_devices), device, mesh)
        if route.group_size > 1:
            sent = counts * (1, _SENT[name](route.group_size))
            _add(totals, (name, dtype, route), sent)
    collectives = [
        Collective(
            name=name,
            dtype=dtype,
            axes=route.axes,
            group_size=route.group_size,
            num_calls=round(num_calls),
            sent_bytes=round(sent),
            is_within_node=route.is_within_node,
            seconds=float(sent) / route.bytes_per_s if route.bytes_per_s else None,
        )
        for (name, dtype, route), (num_calls, sent) in totals.items()
    ]
    return tuple(sorted(collectives, key=lambda c: -c.sent_bytes))


def _count(computations: dict, name: str) -> dict[Any, np.ndarray]:
    """Returns number and bytes of operands, by collective, dtype and groups."""
    totals: dict[Any, np.ndarray] = {}
    body = {i.name: i for i in computations[name]}
    for i in body.values():
        collective = i.op.removesuffix("-start")
        if collective in _SENT:
            groups = _GROUPS.search(i.rest)
            for operand in (body[name] for name in i.operands):
                key = collective, _dtype_name(operand.dtype), groups and groups[0]
                _add(totals, key, np.array([1.0, operand.num_bytes]))
            continue
        times, names = control_flow(computations, i)
        branches = [_count(computations, name) for name in names]
        if branches:
            largest = max(branches, key=lambda b: sum(size for _, size in b.values()))
            for key, counts in largest.items():
                _add(totals, key, times * counts)
    return totals


def _add(totals: dict[Any, np.ndarray], key: Any, counts: np.ndarray) -> None:
    totals[key] = totals[key] + counts if key in totals else counts


def _route(name: str, groups: np.ndarray, device: Device, mesh: Mesh | None) -> _Route:
    """Finds axes and bandwidth of a collective whose groups are rows of numbers."""
    size = groups.shape[1] if (groups != groups[:, :1]).any() else 1
    axes: tuple[str, ...] = ()
    ids = groups
    if mesh is not None:
        ids = np.array([d.id for d in mesh.devices.flat])[groups]
        places = np.stack(np.unravel_index(groups, mesh.devices.shape))
        differs = (places != places[..., :1]).any((1, 2))
        axes = tuple(np.array(mesh.axis_names)[differs].tolist())
    if device.num_per_node is None:
        return _Route(axes, size, None, None)
    nodes = ids // device.num_per_node
    num_nodes = max(len(set(group)) for group in nodes.tolist())
    num_sharing = size // num_nodes if name in _RINGS else 1
    return _Route(
        axes, size, num_nodes == 1, device.link_bytes_per_s(num_nodes, num_sharing)
    )


def _read_groups(text: str | None, num_devices: int) -> np.ndarray:
    """Returns groups of devices as an array (groups, devices); without text, one."""
    found = _GROUPS.fullmatch(text or "")
    if found and found["shape"]:
        return _reshaped(found["numbers"]).reshape(_ints(found["shape"]))
    if found and found["mesh"]:
        return _groups_along(found["mesh"], found["ids"], found["parts"])
    rows = [_ints(row) for row in _LIST.findall(found["lists"])] if found else []
    if not rows:
        return np.arange(num_devices)[None]
    longest = max(map(len, rows))
    return np.array([row + row[-1:] * (longest - len(row)) for row in rows])


def _groups_along(mesh: str, ids: str | None, parts: str) -> np.ndarray:
    """Returns the groups along axes of a mesh, or along parts of axes.

    `'b':(2)3` is the middle one of three axes into which `b` is cut, of the sizes 2, 3
    and what is left.
    """
    sizes = {name: int(size) for name, size in _AXIS.findall(mesh)}
    places = dict(zip(sizes, np.indices(tuple(sizes.values())), strict=True))
    group_size = 1
    for name, before, part in _AXIS_PART.findall(parts):
        size = int(part or sizes[name])
        stride = sizes[name] // (int(before or 1) * size)
        places[name] = places[name] - places[name] // stride % size * stride
        group_size *= size
    # Devices of a group are now at the same place.
    groups = np.ravel_multi_index(tuple(places.values()), tuple(sizes.values()))
    order = np.argsort(groups, axis=None, kind="stable")
    numbers = np.arange(groups.size) if ids is None else _reshaped(ids)
    return numbers[order].reshape(-1, group_size)


def _reshaped(text: str) -> np.ndarray:
    """Returns the numbers of `[4,2]T(1,0)`, 0 to 7 transposed, or those of `0,2,1`."""
    found = _RESHAPED.fullmatch(text)
    if not found:
        return np.array(_ints(text))
    shape = _ints(found[1])
    order = _ints(found[2]) if found[2] else None
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).ravel()


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _dtype_name(hlo: str) -> str:
    """Returns JAX's name of a dtype of HLO, `float8_e4m3fn` for `f8e4m3fn`.

    >>> [_dtype_name(x) for x in ("bf16", "f32", "s8", "pred", "f8e5m2")]
    ['bfloat16', 'float32', 'int8', 'bool', 'float8_e5m2']
    """
    found = _DTYPE.fullmatch(hlo)
    if not found:
        return {"bf16": "bfloat16", "pred": "bool"}.get(hlo, hlo)
    kind, bits, rest = found.groups()
    return f"{_KINDS[kind]}{bits}{rest and '_' + rest}"
