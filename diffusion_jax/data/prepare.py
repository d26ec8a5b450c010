"""Prepares a data set: original files in, an array_record set of TFDS out."""

import os
from pathlib import Path

from diffusion_jax.data.originals import ORIGINALS, check_folder, download


def data_folder(data_dir: str | None) -> Path:
    """The folder of prepared sets: the one given, else $TFDS_DATA_DIR, else TFDS's default.

    Raises:
      ValueError: if it is an address such as gs://bucket and no local folder.
    """
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    if "://" in str(data_dir):
        raise ValueError(f"the data folder must be a local one, got {data_dir!r}")
    return Path(data_dir).expanduser().resolve()


def prepare(name: str, source_dir: str | None = None, data_dir: str | None = None) -> Path:
    """Writes a data set as array_record files that `TFDS` and `tfds.data_source` read.

    Args:
      name: "digits", "mnist" or "cifar10".
      source_dir: folder with the original files (cifar-10-binary.tar.gz, or the four
        *-ubyte.gz of MNIST). None downloads them and checks their SHA-256. The digits come
        with scikit-learn and take none.
      data_dir: folder of prepared sets; None for TFDS's default.

    Returns:
      The folder of the prepared set. One that is there already is left as it is.

    Raises:
      ValueError: if the name is unknown or the original files are missing or damaged.
      OSError: if a download fails.
    """
    if name not in ORIGINALS:
        raise ValueError(f"no builder for the data set {name!r}; there are {sorted(ORIGINALS)}")
    if source_dir is not None and not ORIGINALS[name]:
        raise ValueError(f"{name} comes with scikit-learn: leave source_dir out")
    folder = data_folder(data_dir)

    import tensorflow_datasets as tfds

    from diffusion_jax.data.builders import BUILDERS

    builder = BUILDERS[name](data_dir=str(folder), file_format="array_record")
    prepared = Path(builder.data_dir)
    if prepared.is_dir():
        return prepared
    if source_dir is not None:
        check_folder(name, source_dir)
    elif ORIGINALS[name]:
        source_dir = str(folder / "downloads" / name)
        for original in ORIGINALS[name]:
            download(original, source_dir)
    config = tfds.download.DownloadConfig(manual_dir=source_dir, try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except OSError:
        # Another process may have finished the same set in the meantime.
        if not prepared.is_dir():
            raise
    return prepared
