# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Inpainting
#
# What is white in the mask is drawn anew, the rest stays.
#
# **With real weights** set `MODEL`: a network of 9 channels that was trained for inpainting,
# `"stable-diffusion-v1-5/stable-diffusion-inpainting"`, or any Stable Diffusion, which then keeps
# the known part by replacing it in every step; `DTYPE = "bfloat16"` on a GPU or TPU; and load your
# own picture of the model's size. As it stands the notebook runs in a minute with random weights,
# and what it draws is noise.

# %%
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from diffusion_jax.data.pipeline import ShapesData
from diffusion_jax.pretrained import from_pretrained, toy_pipeline

MODEL, DTYPE, STEPS = None, None, 10
PICTURE = None  # the path of your own

pipeline = toy_pipeline() if MODEL is None else from_pretrained(MODEL, dtype=DTYPE)
size = pipeline["unet"].config.kept["sample_size"] * pipeline["vae"].config.factor

if PICTURE is None:
    example = ShapesData(image_size=64).source()[0]
    picture = Image.fromarray(np.round((example["image"] + 1) * 127.5).astype(np.uint8))
else:
    picture = Image.open(PICTURE).convert("RGB")
picture = picture.resize((size, size))

mask = np.zeros((size, size), np.uint8)
mask[size // 4 : 3 * size // 4, size // 3 :] = 255
mask = Image.fromarray(mask)

# %%
words = {"num_inference_steps": STEPS, "image": picture, "mask_image": mask, "seed": 0}
drawn = pipeline("a red circle", num_images_per_prompt=2, **words)
print(drawn.task, "with a UNet of", pipeline["unet"].config.in_channels, "channels")

figure, axes = plt.subplots(1, 4, figsize=(12, 3.3))
shown = {"picture": picture, "mask": mask, "image 0": drawn.images[0], "image 1": drawn.images[1]}
for axis, (title, image) in zip(axes, shown.items(), strict=True):
    axis.imshow(image, cmap="gray")
    axis.set_title(title)
    axis.axis("off")
figure.tight_layout()
plt.show()

# %% [markdown]
# The autoencoder changes the known part a little, too. Paste it back where every pixel counts:

# %%
pasted = Image.composite(drawn.images[0], picture, mask)
changed = (np.asarray(pasted) != np.asarray(picture)).any(axis=-1)
print("the known part is unchanged:", not changed[np.asarray(mask) == 0].any())
plt.imshow(pasted)
plt.axis("off")
plt.show()
