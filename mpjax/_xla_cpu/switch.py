"""The one switch for everything in this package, and what is known of the program."""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import Any

is_on = os.environ.get("MPJAX_XLA_CPU_FORMS", "1") != "0"

_is_partitioned = contextvars.ContextVar("is_partitioned", default=False)


@contextlib.contextmanager
def partitioned(is_partitioned: bool) -> Iterator[None]:
    """Says, while its block traces, whether XLA partitions the program over a mesh."""
    token = _is_partitioned.set(is_partitioned)
    try:
        yield
    finally:
        _is_partitioned.reset(token)


def is_partitioned(eqn: Any) -> bool:
    """Whether XLA partitions the program of an equation, as far as a trace shows it.

    It does inside `shard_map`, under `jax.set_mesh` and where `partitioned` says so.
    Arrays that are sharded without a word to the trace do not show.
    """
    mesh = eqn.ctx.cur_abstract_mesh
    return _is_partitioned.get() or (mesh is not None and not mesh.empty)
