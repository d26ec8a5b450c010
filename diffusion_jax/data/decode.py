"""Picture files to arrays, and a clear error where a file is no good."""

from typing import IO, Any

import numpy as np

# Half of Pillow's own limit: where it merely warns of a decompression bomb, this is an error.
MAX_PIXELS = 89_478_485
# A line of a million pixels would be scaled to a few hundred lines of a hundred million each.
MAX_RATIO = 100
_MODES = {1: "L", 3: "RGB"}


class BadImageError(ValueError):
    """A picture that cannot be used; the message names it and says why."""


def decode_image(file: str | IO[bytes], channels: int = 3, *, name: str) -> np.ndarray:
    """Decodes a picture as [H, W, channels] uint8.

    The EXIF orientation is applied, transparency is composited on white, palettes, CMYK and
    grey are converted. Of a file with several pictures the first one counts.

    Args:
      file: path or open binary file.
      channels: 3 for RGB, 1 for grey.
      name: how messages call the picture, usually its path.

    Raises:
      BadImageError: for a file that is broken, no picture, of more than 8 bits a channel, above
        89 million pixels, or more than 100 times as long as wide.
      ValueError: if `channels` is neither 1 nor 3.
      OSError: if the file is not there or cannot be read.
    """
    from PIL import Image, ImageOps

    if channels not in _MODES:
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    try:
        with Image.open(file) as image:
            _check(image, name)
            image = ImageOps.exif_transpose(image)
            return _convert(image, channels)
    except BadImageError:
        raise
    # Pillow's plugins raise what they like on a damaged file: OSError, SyntaxError, IndexError.
    except Exception as error:
        # The system's errors have a number, Pillow's have none: the disk is to blame, not the file.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = f"{type(error).__name__}: {error}"
        raise BadImageError(f"{name}: not a readable picture ({reason})") from error


def _check(image: Any, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(
            f"{name}: {width}x{height} pixels are more than the {MAX_PIXELS} allowed; shrink it"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadImageError(
            f"{name}: {width}x{height} pixels, one side more than {MAX_RATIO} times the other; "
            "crop it"
        )
    stored = [str(tile[3]) for tile in image.tile if len(tile) > 3]
    if image.mode[0] in "IF" or any("16" in layout for layout in stored):
        raise BadImageError(
            f"{name}: more than 8 bits a channel (Pillow mode {image.mode!r}); convert it to "
            "8 bits, with the brightness range you want"
        )


def _convert(image: Any, channels: int) -> np.ndarray:
    from PIL import Image

    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    array = np.asarray(image.convert(_MODES[channels]))
    return array.reshape(array.shape[0], array.shape[1], channels)
