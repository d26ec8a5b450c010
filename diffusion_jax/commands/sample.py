"""sample: images of a trained stage, as arrays and as PNG files that carry their settings."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from diffusion_jax.commands.run import (
    GRID_COLUMNS,
    check_same_model,
    num_classes,
    restore_params,
)
from diffusion_jax.configuration import to_dict
from diffusion_jax.core.arrays import as_arrays, image_keys
from diffusion_jax.core.types import Batch, Params
from diffusion_jax.data.transforms import check_labels, image_grid
from diffusion_jax.experiment import Experiment
from diffusion_jax.systems import Stage, System
from diffusion_jax.systems.stage import validate
from diffusion_jax.training.parallel import make_mesh, mesh_sample


def make_batch_sampler(
    model: Stage | System, mesh: Mesh | None = None
) -> Callable[..., Iterator[np.ndarray]]:
    """The sampler of a stage or of a whole system, compiled once and run over a mesh.

    Args:
      model: what to draw with.
      mesh: from `make_mesh`; None for all devices.

    Returns:
      (params, batch, *, seed, batch_size, first=0, guide=None, sampler=None, grid=None,
      progress=None) -> iterator over batches of images [B, H, W, C] float32, from image number
      `first` on. Image i depends on (seed, i) and on row i of the batch, never on batch_size or
      the devices.
    """
    mesh = make_mesh() if mesh is None else mesh

    def draw_batch(params, batch, keys, guide, sampler, grid):
        return model.sample(params, batch, keys, guide=guide, sampler=sampler, grid=grid)

    compiled = mesh_sample(draw_batch, mesh)

    def sample(
        params: Params,
        batch: Batch,
        *,
        seed: int,
        batch_size: int,
        first: int = 0,
        guide: Any = None,
        sampler: Any = None,
        grid: Any = None,
        progress: str | None = None,
    ) -> Iterator[np.ndarray]:
        total = len(batch["label"])
        whole = -(-min(batch_size, total) // mesh.size) * mesh.size
        guide = as_arrays(model.guide if guide is None else guide)
        sampler = as_arrays(model.sampler if sampler is None else sampler)
        grid = model.grid if grid is None else grid
        starts = range(first, total, whole)
        for start in tqdm(starts, progress, disable=progress is None, leave=False):
            indices = np.arange(start, start + whole)
            # The last batch is filled up to the compiled shape, and cut again below.
            rows = np.minimum(indices, total - 1)
            part = {name: jnp.asarray(values[rows]) for name, values in batch.items()}
            keys = image_keys(seed, indices)
            images = compiled(params, part, keys, guide, sampler, grid)
            yield np.asarray(images)[: total - start]

    return sample


def make_sampler(model: Stage | System, mesh: Mesh | None = None) -> Callable[..., np.ndarray]:
    """`make_batch_sampler` whose batches are joined to images [N, H, W, C]."""
    batches = make_batch_sampler(model, mesh)

    def sample(params: Params, batch: Batch, **options: Any) -> np.ndarray:
        return np.concatenate(list(batches(params, batch, **options)))

    return sample


def _labels(config: Experiment, wanted: tuple[int, ...], count: int) -> np.ndarray:
    if count < 1:
        raise ValueError(f"num_images must be at least 1, got {count}")
    classes = num_classes(config)
    if classes is None:
        if wanted:
            raise ValueError("this system is unconditional, labels mean nothing to it")
        return np.zeros(count, np.int32)
    if wanted:
        check_labels(np.asarray(wanted), classes)
    return np.resize(np.asarray(wanted or range(classes), np.int32), count)


def write_png(path: Path, image: np.ndarray, settings: dict) -> None:
    """Writes one image [H, W, C] uint8 with its settings as JSON in the PNG's text."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("diffusion_jax", json.dumps(settings))
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(pixels).save(path, pnginfo=info)


def draw(
    config: Experiment,
    workdir: Path,
    *,
    labels: tuple[int, ...] = (),
    num_images: int = 40,
    scale: float | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    out: Path | None = None,
) -> list[Path]:
    """Draws images with the averaged weights of the newest checkpoint, one PNG each.

    Args:
      config: the experiment of the run, perhaps with another sampler, grid or guidance.
      workdir: of the run.
      labels: classes, repeated until there are num_images; all in turn if empty.
      num_images: images to draw.
      scale: guidance scale; the configured one where None.
      num_steps: sampling steps; the configured ones where None.
      seed: image i is a function of seed, i and its label.
      batch_size: images drawn at once.
      out: folder for the files; workdir/samples where None.

    Returns:
      the files written: 00000.png, …, and grid.png.

    Raises:
      ValueError: if a value is out of range, or there is no checkpoint.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    system = config.system
    chosen = _labels(config, labels, num_images)
    steps = system.steps if num_steps is None else replace(system.steps, num_steps=num_steps)
    if scale is not None and not hasattr(system, "guide"):
        raise ValueError("this system has no guidance, so no scale")
    guide = None if scale is None else system.guide(scale)
    validate(guide)
    check_same_model(config, workdir)
    built = system.build()
    step, params = restore_params(workdir, built)
    images = make_sampler(built)(
        params,
        {"label": chosen},
        seed=seed,
        batch_size=batch_size,
        guide=guide,
        grid=steps.grid(system.schedule),
        progress="compiling and sampling",
    )
    images = np.clip(images, -1.0, 1.0)
    out = out or workdir / "samples"
    out.mkdir(parents=True, exist_ok=True)
    settings = {"step": step, "seed": seed, "scale": scale, "system": to_dict(system)}
    settings["system"]["steps"] = to_dict(steps)
    files = []
    for index, image in enumerate(images):
        files.append(out / f"{index:05d}.png")
        mine = {**settings, "index": index, "label": int(chosen[index])}
        write_png(files[-1], image_grid(image[None], 1), mine)
    files.append(out / "grid.png")
    write_png(files[-1], image_grid(images, min(GRID_COLUMNS, len(images))), settings)
    print(f"{len(images)} images and grid.png are in {out}")
    return files
