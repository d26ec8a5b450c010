# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Schedules and samplers compared
#
# Schedules are functions from a time to a noise level, and samplers are pytrees that step along a
# grid of levels. Any sampler runs on any schedule, and every pipeline takes any sampler.
#
# **With real weights** set `MODEL` to a Stable Diffusion, for example
# `"stable-diffusion-v1-5/stable-diffusion-v1-5"`, with `DTYPE = "bfloat16"` on a GPU or TPU; the
# first two parts need none. As it stands the notebook runs in about two minutes.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import diffusion_jax as dj
from diffusion_jax.pretrained import from_pretrained, toy_pipeline

MODEL, DTYPE = None, None

# %% [markdown]
# ## Schedules
# The logarithm of the signal-to-noise ratio, log α²/σ², over the time.

# %%
for name in ("linear", "scaled_linear", "cosine", "sigmoid"):
    schedule = dj.SCHEDULES[name]()
    t = np.linspace(schedule.t_min, schedule.t_max, 200)
    level = schedule(t)
    plt.plot(t / schedule.t_max, 2 * np.log(level.alpha / level.sigma), label=name)
plt.xlabel("t / T")
plt.ylabel("log-SNR")
plt.ylim(-12, 12)
plt.legend()
plt.show()

# %% [markdown]
# ## Samplers on an exact denoiser
# Data N(0.2, 0.5²) have a denoiser in closed form, and so has the flow from noise to data: nothing
# but the sampler errs. Everything that varies is an argument of `draw`: each sampler compiles once.

# %%
schedule = dj.SCHEDULES["edm"]()
keys = dj.image_keys(0, jnp.arange(64))
start = schedule(schedule.t_max)
x_T = start.sigma * dj.initial_noise(keys, (1, 1, 1))


@jax.jit
def draw(sampler, grid, x_T, keys):
    """Images from noise."""

    def denoise(x, level):
        gain = level.alpha * 0.25 / (level.alpha**2 * 0.25 + level.sigma**2)
        return dj.Prediction(0.2 + gain * (x - level.alpha * 0.2))

    return dj.sample(sampler, denoise, grid, x_T, keys)[0]


exact = 0.2 + 0.5 * (x_T - start.alpha * 0.2) / np.sqrt(0.25 * start.alpha**2 + start.sigma**2)

steps = (10, 20, 40, 80)
for name in ("ddim", "dpm_solver_multistep", "unipc", "heun"):
    sampler = dj.SAMPLERS[name]()
    grids = [dj.TIMESTEPS["karras"](schedule, count) for count in steps]
    errors = [float(abs(draw(sampler, grid, x_T, keys) - exact).max()) for grid in grids]
    plt.loglog(steps, errors, "o-", label=name)
    print(name, [f"{error:.1e}" for error in errors])
plt.xlabel("steps (Heun calls the network twice in each)")
plt.ylabel("largest error")
plt.legend()
plt.show()

# %% [markdown]
# ## Samplers on a network
# From the same noise all deterministic samplers go to the same latents; how fast?

# %%
pipeline = toy_pipeline() if MODEL is None else from_pretrained(MODEL, dtype=DTYPE)
words = {"guidance_scale": 2.0, "spacing": "exponential", "seed": 0, "output_type": "latent"}


def latents(sampler, count):
    """Latents after so many steps."""
    drawn = pipeline("a red circle", sampler=sampler, num_inference_steps=count, **words)
    return np.asarray(drawn.images)


reference = latents("dpm_solver_multistep", 200)
counts = (10, 20, 40, 80)
for name in ("ddim", "dpm_solver_multistep", "unipc"):
    errors = [np.sqrt(np.mean((latents(name, count) - reference) ** 2)) for count in counts]
    plt.loglog(counts, errors, "o-", label=name)
    print(name, [f"{error:.1e}" for error in errors])
plt.xlabel("steps")
plt.ylabel("distance to 200 steps")
plt.legend()
plt.show()
