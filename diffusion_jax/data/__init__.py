"""Data: configurations by name; sources and iterators are imported when they are used."""

from diffusion_jax.data.pipeline import TFDS, Cached, Digits, Folder, ShapesData, WebDataset

DATASETS = {
    "digits": Digits,
    "shapes": ShapesData,
    "folder": Folder,
    "webdataset": WebDataset,
    "tfds": TFDS,
    "cached": Cached,
}
