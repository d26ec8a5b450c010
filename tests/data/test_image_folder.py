"""Users' pictures: every kind that is fine, every kind that is not, captions and classes."""

import errno
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import Folder
from diffusion_jax.data.decode import BadImageError, decode_image

RED = (255, 0, 0)


def _file(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def _png(width, height, *, bits, colour):
    """A PNG file with a header of our own making and no more than one row of pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    row = b"\0" + bytes(width * (bits // 8) * (3 if colour == 2 else 1)) if width < 100 else b""
    data = zlib.compress(row * min(height, 100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def _palette_with_transparency():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 1)
    return _file(image, transparency=0)


@pytest.mark.parametrize(
    "file, corner, rest",
    [
        (_file(Image.new("RGB", (4, 4), RED)), RED, RED),
        (_file(Image.new("L", (4, 4), 90)), (90,) * 3, (90,) * 3),
        (_file(Image.new("1", (4, 4), 1)), (255,) * 3, (255,) * 3),
        (_file(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), RED, RED),
        # Half transparent red on white, and fully transparent black.
        (_file(Image.new("RGBA", (4, 4), (*RED, 128))), (255, 127, 127), (255, 127, 127)),
        (_file(Image.new("LA", (4, 4), (0, 0))), (255,) * 3, (255,) * 3),
        (_palette_with_transparency(), RED, (255,) * 3),
    ],
    ids=["RGB", "L", "1", "CMYK", "RGBA", "LA", "P"],
)
def test_all_modes_become_rgb_on_white(file, corner, rest):
    image = decode_image(file, name="x")
    assert image.shape == (4, 4, 3) and image.dtype == np.uint8
    np.testing.assert_allclose(image[0, 0].astype(int), corner, atol=1)
    np.testing.assert_allclose(image[2, 3].astype(int), rest, atol=1)


def test_grey_is_the_luminance():
    grey = decode_image(_file(Image.new("RGB", (3, 2), (0, 255, 0))), 1, name="x")
    assert grey.shape == (2, 3, 1)
    # ITU-R 601: 0.587 of green.
    np.testing.assert_allclose(grey.astype(int), 150, atol=1)
    with pytest.raises(ValueError, match="got 2"):
        decode_image(_file(Image.new("L", (3, 2))), 2, name="x")


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned = decode_image(_file(image, exif=exif), name="x")
    assert turned.shape == (4, 2, 3) and tuple(turned[0, 1]) == RED


BROKEN = {
    "html": (b"<html>not found</html>", "not a readable picture"),
    "empty": (b"", "not a readable picture"),
    "truncated": (
        _file(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG").getvalue()[:900],
        "not a readable picture",
    ),
    "16 bit grey": (
        _file(Image.fromarray(np.full((4, 4), 999, np.uint16))).getvalue(),
        "8 bits a channel",
    ),
    "16 bit colour": (_png(4, 4, bits=16, colour=2), "8 bits a channel"),
    "float": (
        _file(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF").getvalue(),
        "8 bits a channel",
    ),
    "16 bit TIFF": (
        _file(Image.fromarray(np.full((4, 4), 999, np.uint16)), "TIFF").getvalue(),
        "8 bits a channel",
    ),
    "32 bit TIFF": (
        _file(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF").getvalue(),
        "8 bits a channel",
    ),
    # To a side of 8 this would be 8 x 6,400,000 pixels, and more than memory has to a side of 512.
    "line": (_png(800_000, 1, bits=8, colour=0), "800000x1 pixels.*crop it"),
    "huge": (_png(20_000, 20_000, bits=8, colour=0), "pixels|Bomb"),
    "large": (_png(10_000, 10_000, bits=8, colour=0), "10000x10000"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_file_is_named(tmp_path, kind):
    data, message = BROKEN[kind]
    (tmp_path / "bad one.png").write_bytes(data)
    source = Folder(str(tmp_path), 8).source()
    with pytest.raises(BadImageError, match=f"bad one.png: .*({message})"):
        source[0]


class _FailingDisk(io.BytesIO):
    def read(self, size=-1):
        raise OSError(errno.EIO, "Input/output error")


def test_a_failing_disk_does_not_make_a_picture_bad():
    with pytest.raises(OSError, match="Input/output error") as caught:
        decode_image(_FailingDisk(), name="x")
    assert caught.value.errno == errno.EIO


def _folder(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 + i, 12), (i * 20, 0, 0)).save(root / name)
    return root


def test_pictures_are_found_recursively_and_in_order(tmp_path):
    _folder(tmp_path, ["b.png", "a/z.JPG", "a/y.webp", ".hidden/x.png", "c.jpeg"])
    (tmp_path / "notes.txt").write_text("none")
    source = Folder(str(tmp_path), 8).source()
    assert len(source) == 4
    reds = [(source[i]["image"][4, 4, 0] + 1) * 127.5 for i in range(4)]
    np.testing.assert_allclose(reds, [40, 20, 0, 80], atol=3)  # a/y, a/z, b, c
    example = source[2]
    assert set(example) == {"image"}
    assert example["image"].shape == (8, 8, 3) and example["image"].dtype == np.float32


def test_an_empty_folder_is_named_with_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}.*\\.jpg, .*\\.webp"):
        Folder(str(tmp_path), 8).source()
    with pytest.raises(ValueError, match="nowhere' is not a folder"):
        Folder(str(tmp_path / "nowhere"), 8).source()


@pytest.mark.parametrize("kind", ["txt", "captions.json", "metadata.jsonl"])
def test_captions(tmp_path, kind):
    wanted = {"cat.png": "a cat", "sub/dog.png": "a dög"}
    _folder(tmp_path, wanted)
    if kind == "txt":
        for name, caption in wanted.items():
            (tmp_path / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    elif kind == "captions.json":
        (tmp_path / kind).write_text(json.dumps(wanted))
    else:
        rows = [json.dumps({"file_name": n, "text": c}) for n, c in wanted.items()]
        (tmp_path / kind).write_text("\n".join(rows))
    source = Folder(str(tmp_path), 8, captions=True).source()
    assert [source[i]["caption"] for i in range(2)] == ["a cat", "a dög"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "2 of 2 pictures have no caption.*cat.png"),
        ({"cat.txt": "a cat"}, "1 of 2 pictures have no caption.*dog.png"),
        ({"captions.json": "{", "cat.txt": ""}, "captions.json: not JSON"),
        ({"captions.json": "[1]"}, "got list"),
        ({"captions.json": '{"cat.png": 3}'}, "'cat.png' is no text: 3"),
        ({"metadata.jsonl": '{"file_name": "cat.png"}'}, "line 1: 'file_name' and 'text'"),
        ({"metadata.jsonl": '{"file_name": ["cat.png"], "text": "x"}'}, "line 1: 'file_name' and"),
        (
            {"metadata.jsonl": '{"file_name": "cat.png", "text": null}'},
            "'cat.png' is no text: None",
        ),
        ({"captions.json": "[" * 10**5}, "captions.json: not JSON"),
        ({"metadata.jsonl": "", "captions.json": "{}"}, "keep one"),
    ],
)
def test_wrong_captions_are_refused(tmp_path, files, message):
    _folder(tmp_path, ["cat.png", "dog.png"])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Folder(str(tmp_path), 8, captions=True).source()


def test_captions_must_be_text(tmp_path):
    _folder(tmp_path, ["cat.png"])
    (tmp_path / "cat.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="cat.txt: captions must be UTF-8"):
        Folder(str(tmp_path), 8, captions=True).source()


def test_class_folders(tmp_path):
    _folder(tmp_path, ["dog/1.png", "cat/1.png", "cat/more/2.png"])
    config = Folder(str(tmp_path), 8, classes=True)
    source = config.source()
    assert config.num_classes == 2 and source.class_names == ["cat", "dog"]
    assert [int(source[i]["label"]) for i in range(3)] == [0, 0, 1]
    assert Folder(str(tmp_path), 8).num_classes is None
    _folder(tmp_path, ["stray.png"])
    with pytest.raises(ValueError, match="stray.png lies in no class folder"):
        config.source()
