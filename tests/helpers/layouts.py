"""A layout for the transformer of the benchmarks: columns and rows over `tensor`."""

from jax.sharding import PartitionSpec as P

from mpjax.sharding import LayoutRules


def transformer_layout():
    """Splits heads and hidden units over `tensor`, widths over `fsdp`.

    The parameters of all layers are stacked along their first axis.
    """
    return LayoutRules(
        [
            ("params/qkv$", P(None, "fsdp", None, "tensor")),
            ("params/out$", P(None, "tensor", None, "fsdp")),
            ("up/w$", P(None, "fsdp", "tensor")),
            ("up/b$", P(None, "tensor")),
            ("down/w$", P(None, "tensor", "fsdp")),
        ]
    )
