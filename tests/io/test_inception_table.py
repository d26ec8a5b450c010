"""The name table of Inception against the names and shapes in the peers' files."""

import functools
from pathlib import Path

import numpy as np
import pytest

from diffusion_jax.io.mapping import MappingError, convert, export
from diffusion_jax.io.tables.inception import INCEPTION_IGNORED, inception_rows
from diffusion_jax.metrics.inception import inception_shapes

TESTS = Path(__file__).resolve().parents[1]
RECORDED = np.load(TESTS / "metrics" / "data" / "inception.npz", allow_pickle=False)

_shapes = functools.cache(inception_shapes)


def _file(peer):
    """Tensors of zeros with the names and shapes of a peer's state, without their memory."""
    tensors = {}
    for line in RECORDED[f"names_{peer}"]:
        name, shape = str(line).split(":")
        shape = tuple(int(size) for size in shape.split(",") if size)
        tensors[name] = np.broadcast_to(np.float32(0), shape)
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, peer", [("pytorch-fid", "pytorch-fid"), ("torchvision", "torchvision")]
)
def test_the_table_covers_a_file_both_ways(variant, peer):
    tensors, shapes = _file(peer), _shapes(variant)
    params = convert(tensors, inception_rows(), shapes, ignore=INCEPTION_IGNORED)
    back = export(params, inception_rows())
    left_over = {name for name in tensors if name not in back}
    assert left_over == {
        name
        for name in tensors
        if name.endswith(".num_batches_tracked") or name.startswith("AuxLogits.")
    }
    assert set(back) <= set(tensors)
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensors[name].shape for name in back
    }


def test_every_row_is_used_and_none_is_double():
    rows = inception_rows()
    assert len({row.source for row in rows}) == len({row.target for row in rows}) == len(rows)
    # 94 convolutions with four rows each, and two for the last layer.
    assert len(rows) == 94 * 4 + 2


def test_files_of_one_variant_do_not_load_as_another():
    with pytest.raises(MappingError, match="fc.weight"):
        convert(
            _file("pytorch-fid"),
            inception_rows(),
            _shapes("torchvision"),
            ignore=INCEPTION_IGNORED,
        )
    tensors = _file("pytorch-fid")
    del tensors["Mixed_7c.branch_pool.bn.running_var"]
    with pytest.raises(MappingError, match="missing: Mixed_7c.branch_pool.bn.running_var"):
        convert(tensors, inception_rows(), _shapes("pytorch-fid"), ignore=INCEPTION_IGNORED)
