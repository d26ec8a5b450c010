"""Name tables: layouts against their definitions, both directions, and every refusal."""

import jax
import numpy as np
import pytest

from diffusion_jax.io.mapping import KINDS, MappingError, Row, Share, convert, export, prefixed

ROWS = (
    Row("block.{i}.conv{j}", "block_{i}/conv_{j}", "conv"),
    Row("proj", "proj", "linear"),
    Row("point", "point", "conv1x1_as_linear"),
    Row("norm", "norm", "norm"),
    Row("token", "token", "embed"),
    Row("alpha", "gate/alpha", "param"),
    Row("narrow", "narrow", "conv1d_as_linear"),
    Row("place", "place", "transposed"),
)


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def file():
    return {
        "block.10.conv1.weight": normal(4, 3, 2, 5),
        "block.10.conv1.bias": normal(4),
        "block.2.conv1.weight": normal(2, 3, 1, 1),
        "proj.weight": normal(4, 3),
        "proj.bias": normal(4),
        "point.weight": normal(4, 3, 1, 1),
        "norm.weight": normal(6),
        "norm.bias": normal(6),
        "token.weight": normal(7, 2),
        "alpha": normal(),
        "narrow.weight": normal(5, 3, 1),
        "place": normal(4, 7),
    }


def tree():
    return {
        "block_10": {"conv_1": {"kernel": normal(2, 5, 3, 4), "bias": normal(4)}},
        "block_2": {"conv_1": {"kernel": normal(1, 1, 3, 2)}},
        "proj": {"kernel": normal(3, 4), "bias": normal(4)},
        "point": {"kernel": normal(3, 4)},
        "norm": {"scale": normal(6), "bias": normal(6)},
        "token": {"embedding": normal(7, 2)},
        "gate": {"alpha": normal()},
        "narrow": {"kernel": normal(3, 5)},
        "place": normal(7, 4),
    }


def leaves(params):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def assert_equal(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_layouts_are_the_ones_that_the_kinds_name():
    tensors = file()
    params = convert(tensors, ROWS, tree())
    conv = params["block_10"]["conv_1"]["kernel"]
    # Weight of (out 3, in 2, row 1, column 4) in the file's order.
    assert conv[1, 4, 2, 3] == tensors["block.10.conv1.weight"][3, 2, 1, 4]
    x = normal(3)
    np.testing.assert_allclose(
        x @ params["proj"]["kernel"], tensors["proj.weight"] @ x, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(params["point"]["kernel"], tensors["point.weight"][:, :, 0, 0].T)
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["norm.weight"])
    np.testing.assert_array_equal(params["token"]["embedding"], tensors["token.weight"])
    np.testing.assert_array_equal(params["gate"]["alpha"], tensors["alpha"])
    np.testing.assert_array_equal(params["narrow"]["kernel"], tensors["narrow.weight"][:, :, 0].T)
    assert params["place"][6, 3] == tensors["place"][3, 6]


def test_this_table_uses_every_kind():
    assert {row.kind for row in ROWS} == set(KINDS)


def test_both_directions_undo_each_other_and_are_contiguous():
    tensors, params = file(), tree()
    assert_equal(convert(export(params, ROWS), ROWS, params), params)
    back = export(convert(tensors, ROWS, params), ROWS)
    assert_equal(back, tensors)
    for array in [*back.values(), *jax.tree.leaves(convert(tensors, ROWS, params))]:
        assert array.flags.c_contiguous


def test_a_file_can_be_written_and_read(tmp_path):
    """The numpy writer of safetensors stores a transposed view wrongly, without a word."""
    from safetensors.numpy import load_file, save_file

    save_file(export(tree(), ROWS), tmp_path / "a.safetensors")
    assert_equal(convert(load_file(tmp_path / "a.safetensors"), ROWS, tree()), tree())


def test_one_error_lists_everything_that_is_wrong():
    tensors = file()
    del tensors["proj.bias"], tensors["alpha"]
    tensors["stranger.weight"] = normal(2)
    tensors["norm.weight"] = normal(5)
    tensors["point.weight"] = normal(4, 3, 3, 3)
    tensors["token.weight"] = normal(7)
    tensors["narrow.weight"] = normal(5, 3, 2)
    tensors["block.2.conv1.weight"] = normal(2, 3, 1, 1).astype(np.float64)
    with pytest.raises(MappingError) as error:
        convert(tensors, ROWS, tree())
    message = str(error.value)
    for part in (
        "8 problem(s)",
        "missing: proj.bias (for proj/bias)",
        "missing: alpha (for gate/alpha)",
        "unexpected: stranger.weight (2,)",
        "norm.weight (for norm/scale): has shape (5,), which becomes (5,), expected (6,)",
        "point.weight (for point/kernel): a 1x1 convolution must have shape (O, I, 1, 1)",
        "narrow.weight (for narrow/kernel): a convolution of width 1 must have shape (O, I, 1)",
        "token.weight (for token/embedding): has shape (7,), expected 2 dimensions",
        "block.2.conv1.weight (for block_2/conv_1/kernel): has dtype float64",
    ):
        assert part in message, f"{part!r} is not in:\n{message}"


def test_left_over_tensors_can_be_ignored_by_name():
    tensors = {**file(), "model.position_ids": normal(3)}
    with pytest.raises(MappingError, match="unexpected: model.position_ids"):
        convert(tensors, ROWS, tree())
    assert_equal(
        convert(tensors, ROWS, tree(), ignore=("*.position_ids",)), convert(file(), ROWS, tree())
    )


def test_tensors_are_widened_never_narrowed():
    half = {name: tensor.astype(np.float16) for name, tensor in file().items()}
    widened = convert(half, ROWS, tree())
    np.testing.assert_array_equal(widened["token"]["embedding"], half["token.weight"])
    assert widened["token"]["embedding"].dtype == np.float32
    wanted = jax.tree.map(lambda leaf: leaf.astype(np.float16), tree())
    with pytest.raises(MappingError, match="which float16 cannot hold exactly"):
        convert(file(), ROWS, wanted)


@pytest.mark.parametrize(
    "rows, words",
    [
        (ROWS[1:], "parameter block_10/conv_1/kernel: no row"),
        ((*ROWS, Row("p", "proj", "linear")), "parameter proj/kernel: 2 rows"),
        (
            tuple(Row("proj", r.target, r.kind) if r.target == "point" else r for r in ROWS),
            "tensor proj.weight: wanted by",
        ),
    ],
)
def test_a_table_that_does_not_fit_the_tree_is_refused_in_both_directions(rows, words):
    with pytest.raises(MappingError, match=words):
        export(tree(), rows)
    with pytest.raises(MappingError, match=words):
        convert(file(), rows, tree())


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="got 'dense'"):
        export({}, [Row("a", "a", "dense")])


def test_the_same_letter_is_the_same_number():
    rows = [Row("a.{i}.b.{i}", "a_{i}/b_{i}", "param")]
    assert set(export({"a_1": {"b_1": normal(2)}}, rows)) == {"a.1.b.1"}
    with pytest.raises(MappingError, match="no row"):
        export({"a_1": {"b_2": normal(2)}}, rows)


def test_a_table_can_lie_deeper():
    rows = prefixed(ROWS[1:2], source="model.", target="unet/")
    assert set(export({"unet": {"proj": {"kernel": normal(3, 4)}}}, rows)) == {"model.proj.weight"}


def shared(groups, count=3):
    return tuple(
        Row("qkv", f"attention/{name}", "linear", Share(i, count, groups))
        for i, name in enumerate("qkv")
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_share_a_tensor_in_turns(groups):
    """qkv has 12 rows of 5: with two groups they are q q k k v v q q k k v v."""
    tensors = {"qkv.weight": normal(12, 5), "qkv.bias": np.arange(12, dtype=np.float32)}
    expected = {"kernel": np.zeros((5, 4), np.float32), "bias": np.zeros(4, np.float32)}
    expected = {"attention": dict.fromkeys("qkv", expected)}
    params = convert(tensors, shared(groups), expected)["attention"]
    turns = {1: [0, 1, 2, 3], 2: [0, 1, 6, 7]}[groups]
    step = {1: 4, 2: 2}[groups]
    for i, name in enumerate("qkv"):
        mine = np.asarray(turns) + i * step
        np.testing.assert_array_equal(params[name]["bias"], mine)
        np.testing.assert_array_equal(params[name]["kernel"], tensors["qkv.weight"][mine].T)
    assert_equal(export({"attention": params}, shared(groups)), tensors)


def share_tree(**leaves):
    return {"attention": {name: {"bias": leaf} for name, leaf in leaves.items()}}


@pytest.mark.parametrize(
    "rows, names",
    [
        (shared(1), "qk"),
        (shared(1, count=4), "qkv"),
        ((*shared(1)[:2], shared(2)[2]), "qkv"),
        ((*shared(1)[:2], shared(1)[1]._replace(target="attention/v")), "qkv"),
        ((*shared(1)[:2], shared(1)[2]._replace(share=None)), "qkv"),
    ],
    ids=["one is missing", "a fourth is missing", "groups differ", "one twice", "one wants all"],
)
def test_a_tensor_that_is_not_shared_out_is_refused_in_both_directions(rows, names):
    params = share_tree(**{name: normal(4) for name in names})
    with pytest.raises(MappingError, match="tensor qkv.bias: wanted by .* do not share it out"):
        export(params, rows)
    with pytest.raises(MappingError, match="tensor qkv.bias: wanted by .* do not share it out"):
        convert({"qkv.bias": normal(12)}, rows, params)


def test_shares_must_fit_the_tensor_and_each_other():
    params = share_tree(q=normal(4), k=normal(4), v=normal(4))
    with pytest.raises(
        MappingError, match=r"has shape \(13,\), whose first axis has to fall into 6"
    ):
        convert({"qkv.bias": normal(13)}, shared(2), params)
    with pytest.raises(MappingError, match="its shares differ in shape or dtype"):
        export(share_tree(q=normal(4), k=normal(4), v=normal(2)), shared(1))
    with pytest.raises(MappingError, match=r"shares have shape \(4,\), which has no 3 groups"):
        export(params, shared(3))
    with pytest.raises(ValueError, match="0 <= index < count"):
        export(params, [Row("qkv", "attention/q", "linear", Share(3, 3))])


COPIES = (Row("token", "token", "embed", copies=("old.token",)),)


@pytest.mark.parametrize("names", [["token"], ["old.token"], ["token", "old.token"]])
def test_shared_weights_are_read_under_any_of_their_names(names):
    tensors = {f"a.{name}.weight": normal(7, 2) for name in names}
    rows, tree = prefixed(COPIES, source="a."), {"token": {"embedding": normal(7, 2)}}
    params = convert(tensors, rows, tree)
    np.testing.assert_array_equal(params["token"]["embedding"], normal(7, 2))
    assert list(export(params, rows)) == ["a.token.weight"]


def test_copies_of_a_weight_that_differ_are_refused():
    tensors = {"token.weight": normal(7, 2), "old.token.weight": normal(7, 2) + 1}
    with pytest.raises(MappingError, match="old.token.weight: must equal token.weight"):
        convert(tensors, COPIES, {"token": {"embedding": normal(7, 2)}})
