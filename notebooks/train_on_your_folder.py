# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Train on your own folder
#
# A LoRA for a Stable Diffusion, from a folder of pictures with a caption beside each (`cat.png`,
# `cat.txt`). It is what `diffusion-jax finetune` does; an interrupted run goes on where it was.
#
# **With real weights** set `MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"`, `PICTURES` to
# your folder, `STEPS` to about a hundred for each picture, and remove `learning_rate` for the
# usual 1e-4; `DTYPE = "bfloat16"` on a GPU or TPU. As it stands the notebook trains on rendered
# shapes with random weights, in two minutes.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt

from diffusion_jax.commands.finetune import FineTune
from diffusion_jax.commands.toy import Toy
from diffusion_jax.pretrained import from_pretrained, with_lora

MODEL, PICTURES, DTYPE, STEPS = None, None, None, 60
WORKDIR = Path("runs/notebook")

if MODEL is None or PICTURES is None:
    if not Path("toy/model").exists():
        Toy(Path("toy")).run()
    MODEL, PICTURES = MODEL or "toy/model", PICTURES or "toy/pictures"

# %%
training = FineTune(
    model=str(MODEL),
    data=str(PICTURES),
    workdir=WORKDIR,
    rank=4,  # 0 trains the whole UNet
    num_steps=STEPS,
    batch_size=4,
    learning_rate=1e-2,
    dtype=DTYPE,
    log_every=5,
)
training.run()

# %% [markdown]
# The loss of one step is mostly about how noisy its examples are; look at the trend.

# %%
rows = [json.loads(line) for line in (WORKDIR / "metrics.jsonl").read_text().splitlines()]
rows = [row for row in rows if "loss" in row]
plt.plot([row["step"] for row in rows], [row["loss"] for row in rows])
plt.xlabel("step")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# The file in `runs/notebook/lora` is of the layout that diffusers and PEFT read. Its scale is
# chosen when it is merged.

# %%
pipeline = from_pretrained(MODEL, dtype=DTYPE)
scales = (0.0, 0.5, 1.0)
figure, axes = plt.subplots(1, len(scales), figsize=(9, 3.3))
for axis, scale in zip(axes, scales, strict=True):
    adapted = with_lora(pipeline, WORKDIR / "lora", scale)
    axis.imshow(adapted("a red circle", num_inference_steps=10, seed=0).images[0])
    axis.set_title(f"scale {scale}")
    axis.axis("off")
figure.tight_layout()
plt.show()
