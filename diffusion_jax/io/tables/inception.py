"""torchvision's Inception3: its names as those of our Inception."""

from collections.abc import Mapping

from diffusion_jax.io.mapping import Row

_STEM: Mapping[str, str] = {
    "Conv2d_1a_3x3": "conv_1a",
    "Conv2d_2a_3x3": "conv_2a",
    "Conv2d_2b_3x3": "conv_2b",
    "Conv2d_3b_1x1": "conv_3b",
    "Conv2d_4a_3x3": "conv_4a",
}
# Kind of block -> the prefix and the endings of its branches' layers.
_BRANCHES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "A": {"1x1": ("",), "5x5": ("_1", "_2"), "3x3dbl": ("_1", "_2", "_3"), "_pool": ("",)},
    "B": {"3x3": ("",), "3x3dbl": ("_1", "_2", "_3")},
    "C": {
        "1x1": ("",),
        "7x7": ("_1", "_2", "_3"),
        "7x7dbl": ("_1", "_2", "_3", "_4", "_5"),
        "_pool": ("",),
    },
    "D": {"3x3": ("_1", "_2"), "7x7x3": ("_1", "_2", "_3", "_4")},
    "E": {
        "1x1": ("",),
        "3x3": ("_1", "_2a", "_2b"),
        "3x3dbl": ("_1", "_2", "_3a", "_3b"),
        "_pool": ("",),
    },
}
_BLOCKS: Mapping[str, str] = {
    **dict.fromkeys(("5b", "5c", "5d"), "A"),
    "6a": "B",
    **dict.fromkeys(("6b", "6c", "6d", "6e"), "C"),
    "7a": "D",
    **dict.fromkeys(("7b", "7c"), "E"),
}

# Counters that evaluation has no use for, and the head that only training has.
INCEPTION_IGNORED = ("*.num_batches_tracked", "AuxLogits.*")


def _layer(source: str, target: str) -> tuple[Row, ...]:
    return (
        Row(f"{source}.conv", f"{target}/conv", "conv"),
        Row(f"{source}.bn", f"{target}/norm", "norm"),
        Row(f"{source}.bn.running_mean", f"{target}/norm/mean", "param"),
        Row(f"{source}.bn.running_var", f"{target}/norm/var", "param"),
    )


def inception_rows() -> tuple[Row, ...]:
    """The table of Inception3's weights: torchvision's, and the port of the graph of 2015.

    Files hold "Mixed_5b.branch1x1.conv.weight", "Mixed_5b.branch1x1.bn.running_mean",
    "fc.weight" and so on; `INCEPTION_IGNORED` may be left over.
    """
    rows = [Row("fc", "fc", "linear"), Row("fc.bias", "fc_bias", "param")]
    for source, target in _STEM.items():
        rows += _layer(source, target)
    for block, kind in _BLOCKS.items():
        for branch, endings in _BRANCHES[kind].items():
            for ending in endings:
                name = f"branch{branch}{ending}"
                rows += _layer(f"Mixed_{block}.{name}", f"mixed_{block}/{name}")
    return tuple(rows)
