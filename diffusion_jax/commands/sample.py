"""sample: images of a trained stage, as arrays and as PNG files that carry their settings."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffusion_jax.commands.run import (
    GRID_COLUMNS,
    build_stage,
    check_same_model,
    num_classes,
    restore_params,
)
from diffusion_jax.configuration import to_dict
from diffusion_jax.core.arrays import as_arrays, image_keys
from diffusion_jax.core.types import Batch, Params
from diffusion_jax.data.transforms import check_labels, image_grid
from diffusion_jax.experiment import Experiment
from diffusion_jax.systems import Stage
from diffusion_jax.systems.stage import validate
from diffusion_jax.training.parallel import make_mesh, mesh_sample


def make_sampler(stage: Stage) -> Callable[..., np.ndarray]:
    """The stage's sampler, compiled once and run over every local device.

    Returns:
      (params, batch, *, seed, batch_size, guide=None, sampler=None, grid=None,
      progress=None) -> images [N, H, W, C] float32. Image i depends on (seed, i) and on row i
      of the batch, never on batch_size or the devices.
    """
    mesh = make_mesh()

    def draw_batch(params, batch, keys, guide, sampler, grid):
        return stage.sample(params, batch, keys, guide=guide, sampler=sampler, grid=grid)

    compiled = mesh_sample(draw_batch, mesh)

    def sample(
        params: Params,
        batch: Batch,
        *,
        seed: int,
        batch_size: int,
        guide: Any = None,
        sampler: Any = None,
        grid: Any = None,
        progress: str | None = None,
    ) -> np.ndarray:
        total = len(batch["label"])
        whole = -(-min(batch_size, total) // mesh.size) * mesh.size
        guide = as_arrays(stage.guide if guide is None else guide)
        sampler = as_arrays(stage.sampler if sampler is None else sampler)
        grid = stage.grid if grid is None else grid
        images = []
        for first in tqdm(range(0, total, whole), progress, disable=progress is None, leave=False):
            indices = np.arange(first, first + whole)
            # The last batch is filled up to the compiled shape, and cut again below.
            rows = np.minimum(indices, total - 1)
            part = {name: jnp.asarray(values[rows]) for name, values in batch.items()}
            keys = image_keys(seed, indices)
            images.append(np.asarray(compiled(params, part, keys, guide, sampler, grid)))
        return np.concatenate(images)[:total]

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
    stage = build_stage(config)
    step, params = restore_params(workdir)
    images = make_sampler(stage)(
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
