"""Image arrays on the host: ranges, sizes, flips, contact sheets and the checks of batches."""

import numpy as np

MAX_CHANNELS = 4


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] -> float32 [-1, 1]: x / 127.5 - 1.

    Raises:
      ValueError: if the array is not uint8.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise ValueError(f"to_float takes uint8 in [0, 255], got {image.dtype}")
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Float [-1, 1] -> uint8 [0, 255], rounded to the nearest; values outside are clipped.

    Clipping is part of the job, because samples of a diffusion model overshoot a little.
    The inverse of `to_float` for all 256 values.

    Raises:
      ValueError: if the array is not floating point or holds NaN or infinity.
    """
    image = np.asarray(image)
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"to_uint8 takes floats in [-1, 1], got {image.dtype}")
    if not np.isfinite(image).all():
        raise ValueError(f"to_uint8 got {(~np.isfinite(image)).sum()} values that are NaN or inf")
    return np.rint((np.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts the middle [height, width] out of [H, W, C]; odd remainders go to the far side.

    Raises:
      ValueError: if the image is smaller than the crop.
    """
    have_height, have_width = image.shape[:2]
    if have_height < height or have_width < width:
        raise ValueError(
            f"cannot crop {height}x{width} from an image of {have_height}x{have_width}; "
            "resize it first"
        )
    top, left = (have_height - height) // 2, (have_width - width) // 2
    return image[top : top + height, left : left + width]


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Scales the shorter side to `size` (Lanczos with antialiasing) and crops the middle.

    Args:
      image: [H, W] or [H, W, C] uint8, C of 1, 3 or 4.
      size: side of the square result in pixels, at least 1.

    Returns:
      [size, size, C] uint8; an image that already has this size comes back unchanged.
    """
    from PIL import Image

    if size < 1:
        raise ValueError(f"the image size must be at least 1, got {size}")
    if image.dtype != np.uint8:
        raise ValueError(f"resize_and_crop takes uint8 in [0, 255], got {image.dtype}")
    image = image[..., None] if image.ndim == 2 else image
    height, width, channels = image.shape
    if min(height, width) != size:
        scale = size / min(height, width)
        target = (max(size, round(width * scale)), max(size, round(height * scale)))
        picture = Image.fromarray(image[..., 0] if channels == 1 else image)
        image = np.asarray(picture.resize(target, Image.Resampling.LANCZOS))
        image = image.reshape(target[1], target[0], channels)
    return center_crop(image, size, size)


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Tiles a batch into one picture, row by row; unused cells stay black.

    Args:
      images: [B, H, W, C] uint8, or floats in [-1, 1].
      columns: images per row, at least 1.

    Returns:
      [ceil(B / columns) · H, columns · W, C] uint8.
    """
    images = np.asarray(images)
    if images.ndim != 4 or not len(images) or columns < 1:
        raise ValueError(
            "image_grid takes a non-empty batch [B, H, W, C] and at least one column, got shape "
            f"{images.shape} and {columns} columns"
        )
    images = images if images.dtype == np.uint8 else to_uint8(images)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:count] = images
    cells = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return cells.reshape(rows * height, columns * width, channels)


def check_images(images: np.ndarray, *, name: str = "image") -> None:
    """Checks that a batch of images is NHWC float32, finite, within [-1, 1].

    Args:
      images: what the data pipeline gave for one batch.
      name: how the messages call it.

    Raises:
      ValueError: says which of these does not hold, what came instead and what to do.
    """
    images = np.asarray(images)
    expected = f"{name!r} must be a batch [B, H, W, C] of float32 in [-1, 1]"
    if images.ndim != 4:
        raise ValueError(f"{expected}; got the shape {images.shape}")
    if not images.size:
        raise ValueError(f"{expected}; got no pixels, shape {images.shape}")
    if images.shape[-1] > MAX_CHANNELS:
        hint = "; is it NCHW? Move the channels last" if images.shape[1] <= MAX_CHANNELS else ""
        raise ValueError(f"{expected} with at most 4 channels; got {images.shape}{hint}")
    if images.dtype == np.uint8:
        raise ValueError(f"{expected}; got uint8: apply data.transforms.to_float")
    if images.dtype != np.float32:
        raise ValueError(f"{expected}; got {images.dtype}: convert with astype(np.float32)")
    low, high = float(images.min()), float(images.max())
    # NaN is the least and the greatest of what it is in, and in no range.
    if low >= -1.0 and high <= 1.0:
        return
    bad = int((~np.isfinite(images)).sum())
    if bad:
        raise ValueError(f"{expected}; {bad} of {images.size} values are NaN or infinite")
    hint = "; divide by 127.5 and subtract 1" if low >= 0.0 and high > 2.0 else ""
    raise ValueError(f"{expected}; values span [{low:.4g}, {high:.4g}]{hint}")


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Checks that class labels [B] are integers in 0 … num_classes - 1.

    Raises:
      ValueError: if they have another rank or dtype, or lie outside.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers [B], got {labels.dtype} of {labels.shape}")
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"labels must lie in 0 … {num_classes - 1}, got {labels.min()} … {labels.max()}"
        )
