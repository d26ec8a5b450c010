# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # GLIGEN: phrases in boxes
#
# A caption says what the picture shows, and boxes with phrases say where. The gated attention that
# reads the boxes is open for the first part of the steps, `gligen_scheduled_sampling_beta`.
#
# **With real weights** set `MODEL = "masterful/gligen-1-4-generation-text-box"` and
# `INPAINTING = "masterful/gligen-1-4-inpainting-text-box"`, 50 steps and a scale of 7.5;
# `DTYPE = "bfloat16"` on a GPU or TPU. As it stands the notebook runs in a minute with random
# weights, and its pictures are noise.

# %%
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from diffusion_jax.pretrained import from_pretrained, toy_pipeline

MODEL, INPAINTING, DTYPE, STEPS = None, None, None, 10

pipeline = toy_pipeline() if MODEL is None else from_pretrained(MODEL, dtype=DTYPE)

prompt = "a red circle and a blue square"
phrases = ["a red circle", "a blue square"]
boxes = [[0.1, 0.1, 0.45, 0.45], [0.5, 0.4, 0.95, 0.85]]  # left, top, right, bottom in [0, 1]


# %%
def show(images, titles):
    """A row of pictures with the boxes drawn in."""
    figure, axes = plt.subplots(1, len(images), figsize=(3 * len(images), 3.3), squeeze=False)
    for axis, image, title in zip(axes[0], images, titles, strict=True):
        axis.imshow(image, extent=(0, 1, 1, 0))
        for (left, top, right, bottom), phrase in zip(boxes, phrases, strict=True):
            axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec="red"))
            axis.text(left, top - 0.01, phrase, fontsize=8, color="red")
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    plt.show()


# %%
words = {"num_inference_steps": STEPS, "seed": 0, "output_type": "np"}
grounded = {"gligen_phrases": phrases, "gligen_boxes": boxes}
betas = (0.0, 0.3, 1.0)
images = [
    pipeline(prompt, **grounded, gligen_scheduled_sampling_beta=beta, **words).images[0]
    for beta in betas
]
show(images, [f"open for {beta:.0%} of the steps" for beta in betas])
print("the boxes matter:", bool(np.abs(images[0] - images[2]).max() > 0))

# %% [markdown]
# Inside of the boxes of a given picture alone, with a network that is told the picture:

# %%
if INPAINTING is None:
    inpainting = toy_pipeline(in_channels=9)
else:
    inpainting = from_pretrained(INPAINTING, dtype=DTYPE)
filled = inpainting(prompt, **grounded, gligen_inpaint_image=images[0], **words)
print(filled.task)
show([images[0], filled.images[0]], ["given", "filled"])
