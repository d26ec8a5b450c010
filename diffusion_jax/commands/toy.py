"""toy: a small pipeline with random weights, and pictures with captions to try it with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from diffusion_jax.io.files import write_text

NUM_PICTURES = 16


@dataclass(frozen=True)
class Toy:
    """Writes what one needs to try every command in seconds, without a download.

    FOLDER/model is a Stable Diffusion with GLIGEN's boxes and random weights, so that its pictures
    are noise; FOLDER/pictures are rendered shapes with captions; FOLDER/mask.png is white where
    something new is to be drawn; FOLDER/layout.json has the boxes and phrases of a scene.

    Attributes:
      folder: where it goes.
      seed: of weights and pictures.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    seed: int = 0

    def run(self) -> int:
        """Writes the files."""
        from PIL import Image

        from diffusion_jax.data.pipeline import ShapesData
        from diffusion_jax.pretrained import save_pretrained, toy_pipeline

        pipeline = toy_pipeline(self.seed)
        save_pretrained(pipeline, self.folder / "model")
        size = pipeline["unet"].config.kept["sample_size"] * pipeline["vae"].config.factor
        pictures = self.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        source = ShapesData(image_size=size, seed=self.seed).source()
        for i in range(NUM_PICTURES):
            example = source[i]
            pixels = np.round((example["image"] + 1.0) * 127.5).astype(np.uint8)
            Image.fromarray(pixels).save(pictures / f"{i:02d}.png")
            write_text(pictures / f"{i:02d}.txt", example["caption"] + "\n")
        mask = np.zeros((size, size), np.uint8)
        mask[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 255
        Image.fromarray(mask).save(self.folder / "mask.png")
        layout = {
            "boxes": [[0.1, 0.1, 0.45, 0.45], [0.5, 0.4, 0.95, 0.85]],
            "phrases": ["a red circle", "a blue square"],
        }
        write_text(self.folder / "layout.json", json.dumps(layout, indent=2) + "\n")
        print(f"model, pictures, mask.png and layout.json are in {self.folder}")
        return 0
