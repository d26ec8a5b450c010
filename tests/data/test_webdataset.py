"""Shards of pictures and captions: what webdataset's layout means, and every shard that is bad."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import DATASETS, WebDataset
from diffusion_jax.data.batching import batches
from diffusion_jax.data.decode import BadImageError


def _picture(value, kind="PNG", size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255)).save(buffer, kind)
    return buffer.getvalue()


def _write(path, members, **options):
    """A tar of (name, bytes) pairs, or TarInfo for members without content."""
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return str(path)


def _link(name, kind, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


PAIR = (("a.png", _picture(0)), ("a.txt", b"a cat"))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_pictures_and_captions_in_the_order_of_shards_and_members(tmp_path, form):
    folder = tarfile.TarInfo("part")
    folder.type = tarfile.DIRTYPE
    long = "part/" + "long" * 20 + "er/" + "x" * 60  # longer than the oldest headers allow
    first = [
        ("b.jpg", _picture(255, "JPEG")),
        ("b.txt", " ein Kätzchen\n".encode()),
        folder,
        ("part/a.webp", _picture(0, "WEBP", (16, 8))),
        ("part/a.json", json.dumps({"caption": "a dog", "width": 16}).encode()),
        (f"{long}.PNG", _picture(51)),
        # img2dataset writes both; the text is the caption.
        (f"{long}.json", json.dumps({"caption": None}).encode()),
        (f"{long}.txt", b""),
        (".DS_Store", b"junk"),
        ("part/._a.png", b"junk"),
        ("__index__", b"junk"),
    ]
    _write(tmp_path / "000000.tar", first, format=form)
    _write(tmp_path / "000001.tar", PAIR, format=form)
    source = WebDataset(str(tmp_path / "*.tar"), 8).source()
    assert len(source) == 4
    examples = [source[i] for i in range(4)]
    assert [e["caption"] for e in examples] == ["ein Kätzchen", "a dog", "", "a cat"]
    for example, red in zip(examples, (1, -1, -0.6, -1), strict=True):
        assert example["image"].shape == (8, 8, 3) and example["image"].dtype == np.float32
        np.testing.assert_allclose(example["image"][..., 0], red, atol=0.03)  # JPEG is lossy


def test_names_are_never_paths(tmp_path):
    outside = tmp_path / "out.png"
    outside.write_bytes(b"untouched")
    members = [
        ("../out.png", _picture(255)),
        ("../out.txt", b"escaped"),
        ("/etc/b.png", _picture(0)),
        ("/etc/b.txt", b"absolute"),
    ]
    (tmp_path / "in").mkdir()
    source = WebDataset(_write(tmp_path / "in/0.tar", members), 8).source()
    assert [source[i]["caption"] for i in range(2)] == ["escaped", "absolute"]
    assert outside.read_bytes() == b"untouched"
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["0.tar"]


def test_captions_and_colour_can_be_left_out(tmp_path):
    path = _write(tmp_path / "0.tar", [("a.png", _picture(255)), ("a.cls", b"3")])
    example = WebDataset(path, 4, channels=1, captions=False).source()[0]
    assert list(example) == ["image"] and example["image"].shape == (4, 4, 1)


@pytest.mark.parametrize(
    "members, message",
    [
        ([], "no pictures|empty"),
        ([("notes", b"x")], "no pictures"),
        ([("a.png", _picture(0))], "'a' has no caption.*captions=False"),
        ([("a.txt", b"x")], "'a' has 0 pictures.*files txt"),
        ([("a.avif", b"x"), ("a.txt", b"x")], "'a' has 0 pictures.*avif, txt"),
        ([*PAIR, ("a.jpg", _picture(0))], "'a' has 2 pictures"),
        ([*PAIR, ("a.TXT", b"x")], "two files .txt"),
        ([*PAIR, _link("b.png", tarfile.SYMTYPE)], "'b.png' is a link"),
        ([*PAIR, _link("b.png", tarfile.LNKTYPE, "a.png")], "'b.png' is a link"),
        ([*PAIR, _link("b.png", tarfile.FIFOTYPE)], "'b.png' is a link, a device"),
    ],
)
def test_a_bad_shard_is_named(tmp_path, members, message):
    path = _write(tmp_path / "bad.tar", members)
    with pytest.raises(ValueError, match=f"bad.tar: .*({message})"):
        WebDataset(path, 8).source()


def _tar(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# Where the header of the second member of a tar of PAIR starts.
SECOND = 512 + 512 * -(-len(PAIR[0][1]) // 512)


def _with_size(size):
    # GNU's numbers in base 256: a first byte of 255 says negative, 128 positive.
    data = bytearray(_tar(*PAIR))
    header = memoryview(data)[SECOND : SECOND + 512]
    header[124:136] = size.to_bytes(12, "big", signed=True)
    header[124] |= 128
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(data)


def _with_damaged_second_header():
    data = bytearray(_tar(*PAIR))
    data[SECOND] ^= 255
    return bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>not found</html>" * 100,
        gzip.compress(_tar(*PAIR)),
        _tar(("a.txt", b"x"), ("a.png", bytes(5000)))[:4000],
        _tar(*PAIR)[: SECOND + 100],
        _with_damaged_second_header(),
        _with_size(-512),  # leads back to its own header
        _with_size(2**80),
    ],
    ids=[
        "empty",
        "html",
        "gzip",
        "cut content",
        "cut header",
        "damaged header",
        "negative size",
        "huge size",
    ],
)
def test_a_damaged_shard_is_named_and_nothing_is_lost_silently(tmp_path, content):
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(ValueError, match="bad.tar: damaged, or no uncompressed tar"):
        WebDataset(str(tmp_path / "bad.tar"), 8, captions=False).source()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[1]", "string 'caption'"),
        ("a.json", b'{"caption": null}', "string 'caption'"),
        ("a.json", b'{"caption": ["a cat"]}', "string 'caption'"),
        ("a.json", b"[" * 10**5, "not JSON"),
    ],
)
def test_a_bad_caption_is_named(tmp_path, name, content, message):
    path = _write(tmp_path / "0.tar", [PAIR[0], (name, content)])
    source = WebDataset(path, 8).source()
    with pytest.raises(ValueError, match=f"0.tar: {name}: .*{message}"):
        source[0]


def test_a_bad_picture_is_named(tmp_path):
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 999, np.uint16)).save(deep, "PNG")
    members = [("a.png", b"junk"), ("b.png", deep.getvalue())]
    source = WebDataset(_write(tmp_path / "0.tar", members), 8, captions=False).source()
    with pytest.raises(BadImageError, match=r"0.tar: a.png: not a readable"):
        source[0]
    with pytest.raises(BadImageError, match=r"0.tar: b.png: more than 8 bits"):
        source[1]


def test_shards_that_are_not_there_or_change(tmp_path):
    with pytest.raises(ValueError, match="no file matches"):
        WebDataset(str(tmp_path / "*.tar"), 8).source()
    path = _write(tmp_path / "0.tar", PAIR)
    source = WebDataset(path, 8).source()
    (tmp_path / "0.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match="shorter"):
        source[0]


def test_batches_of_shards_hold_the_pictures(tmp_path):
    members = [(f"{i}.png", _picture(i)) for i in range(5)]
    members += [(f"{i}.txt", b"x") for i in range(5)]
    _write(tmp_path / "0.tar", members)
    source = DATASETS["webdataset"](str(tmp_path / "*.tar"), 8).source()
    found = list(batches(source, batch_size=5, seed=0, num_epochs=1))
    assert len(found) == 1 and list(found[0]) == ["image"]
    reds = np.round((found[0]["image"][:, 0, 0, 0] + 1) * 127.5)
    assert sorted(reds) == [0, 1, 2, 3, 4]
