# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Text to image
#
# A prompt, a few seeds, a negative prompt and the guidance scale; then a picture that starts from
# another one.
#
# **With real weights** set `MODEL` to a hub id or a folder, for example
# `"stable-diffusion-v1-5/stable-diffusion-v1-5"`, and `DTYPE = "bfloat16"` on a GPU or TPU; 30 to
# 50 steps, a scale of 7.5. As it stands the notebook runs in a minute with random weights, and
# its pictures are noise.

# %%
import matplotlib.pyplot as plt
import numpy as np

from diffusion_jax.pretrained import from_pretrained, toy_pipeline

MODEL, DTYPE, STEPS = None, None, 10

pipeline = toy_pipeline() if MODEL is None else from_pretrained(MODEL, dtype=DTYPE)
print({name: type(part).__name__ for name, part in pipeline.items()})


# %%
def show(images, titles):
    """A row of pictures."""
    figure, axes = plt.subplots(1, len(images), figsize=(3 * len(images), 3.3), squeeze=False)
    for axis, image, title in zip(axes[0], images, titles, strict=True):
        axis.imshow(image)
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    plt.show()


# %% [markdown]
# Image i depends on the seed and on i, not on how many are drawn with it: the first of two is the
# first of four.

# %%
words = {"num_inference_steps": STEPS, "negative_prompt": "blurry", "output_type": "np"}
drawn = pipeline("a red circle", num_images_per_prompt=4, seed=0, **words)
show(drawn.images, [f"seed 0, image {i}" for i in range(4)])

two = pipeline("a red circle", num_images_per_prompt=2, seed=0, **words)
print("largest difference:", np.abs(two.images - drawn.images[:2]).max())

# %% [markdown]
# The scale is data: the first call below compiles, the others do not.

# %%
scales = (1.5, 4.0, 7.5, 12.0)
images = [pipeline("a red circle", guidance_scale=s, seed=0, **words).images[0] for s in scales]
show(images, [f"scale {s}" for s in scales])

# %% [markdown]
# From a picture: `strength` says how much of it is noised away.

# %%
start = drawn.images[0]
strengths = (0.3, 0.6, 0.9)
images = [
    pipeline("a blue square", image=start[None], strength=s, seed=1, **words).images[0]
    for s in strengths
]
show([start, *images], ["start", *(f"strength {s}" for s in strengths)])
