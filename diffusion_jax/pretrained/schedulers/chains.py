"""Schedulers that keep x itself and work at the times of a table of β."""

from typing import Any

from diffusion_jax.core.parameterization import Eps, V
from diffusion_jax.core.schedules import Cosine, CosineLogSNR
from diffusion_jax.guidance import StaticThreshold, Unguided
from diffusion_jax.pretrained.schedulers.options import (
    CLIP,
    COMMON_BETAS,
    DISCRETE,
    DYNAMIC,
    KARRAS_BETAS,
    SPACED,
    TWO_PREDICTIONS,
    ZERO_SNR,
    Kind,
    Options,
    Threshold,
    noise_source,
    prediction_of,
    schedule_of,
    spacing_of,
    threshold_of,
)
from diffusion_jax.pretrained.schedulers.rate_steps import SineSteps
from diffusion_jax.pretrained.schedulers.table_steps import (
    DistilledSteps,
    PNDMSteps,
    RepaintSteps,
    TableSteps,
)
from diffusion_jax.samplers.base import Sampler
from diffusion_jax.samplers.consistency import LCM, TCD
from diffusion_jax.samplers.ddim import DDIM
from diffusion_jax.samplers.ddpm import DDPM
from diffusion_jax.samplers.inversion import DDIMInversion
from diffusion_jax.samplers.pndm import IPNDM, PNDM


def _ddpm(o: Options) -> dict[str, Any]:
    kinds = {
        "fixed_small": ("small", None), "fixed_small_log": ("small", None),
        "fixed_large": ("large", None), "learned": ("learned", "variance"),
        "learned_range": ("learned_range", "range"),
    }  # fmt: skip
    variance, learned = kinds[o.choice("variance_type", tuple(kinds))]
    return {
        "schedule": schedule_of(o, (*COMMON_BETAS, "laplace", "sigmoid")),
        "parameterization": prediction_of(o),
        "threshold": threshold_of(o),
        "learned_variance": learned,
        "sampler": DDPM(variance, noise_at_end=True),
        "steps": TableSteps(**spacing_of(o), custom=True, float32=True),
    }


def _ddim(o: Options) -> dict[str, Any]:
    threshold = threshold_of(o)
    eps = "x0" if o.call["use_clipped_model_output"] else noise_source(o, threshold)
    return {
        "schedule": schedule_of(o),
        "parameterization": prediction_of(o),
        "threshold": threshold,
        "sampler": DDIM(o.call["eta"], noise_from=eps),
        "steps": TableSteps(**spacing_of(o), end="stride", clean=o.flag("set_alpha_to_one")),
    }


def _ddim_inverse(o: Options) -> dict[str, Any]:
    threshold = threshold_of(o)
    o.choice("timestep_spacing", ("leading", "trailing"))
    steps = TableSteps(
        **spacing_of(o), end="stride", clean=o.flag("set_alpha_to_one"), inverse=True
    )
    return {
        "schedule": schedule_of(o),
        "parameterization": prediction_of(o),
        "threshold": threshold,
        "sampler": DDIMInversion(variant="reference"),
        "steps": steps,
    }


def _unclip(o: Options) -> dict[str, Any]:
    kinds = {"fixed_small_log": ("small", None), "learned_range": ("learned_range", "range")}
    variance, learned = kinds[o.choice("variance_type", tuple(kinds))]
    o.choice("beta_schedule", ("squaredcos_cap_v2",))
    return {
        "schedule": Cosine(o["num_train_timesteps"]),
        "parameterization": prediction_of(o, ("epsilon", "sample")),
        "threshold": threshold_of(o),
        "learned_variance": learned,
        "sampler": DDPM(variance, noise_at_end=True, variant="unclip"),
        "steps": TableSteps("linspace", end=o.call["prev_timestep"]),
    }


def _pndm(o: Options) -> dict[str, Any]:
    parameterization = prediction_of(o, TWO_PREDICTIONS)
    start = not o.flag("skip_prk_steps")
    return {
        "schedule": schedule_of(o),
        "parameterization": parameterization,
        "sampler": PNDM(start, "v" if isinstance(parameterization, V) else "eps"),
        "steps": PNDMSteps(**spacing_of(o), clean=o.flag("set_alpha_to_one"), runge_kutta=start),
    }


def _ipndm(o: Options) -> dict[str, Any]:
    trained = o["trained_betas"]
    return {
        "schedule": CosineLogSNR(-40.0, 40.0),
        "parameterization": V(),
        "sampler": IPNDM(variant="reference"),
        "steps": SineSteps(None if trained is None else tuple(float(b) for b in trained)),
    }


def _repaint(o: Options) -> dict[str, Any]:
    threshold = StaticThreshold(1.0) if o.flag("clip_sample") else Unguided()
    return {
        "schedule": schedule_of(o, (*COMMON_BETAS, "sigmoid")),
        "parameterization": Eps(),
        "threshold": threshold,
        "sampler": DDIM(o["eta"], noise_from=noise_source(o, threshold)),
        "steps": RepaintSteps(o.call["jump_length"], o.call["jump_n_sample"]),
    }


def _distilled(o: Options, sampler: Sampler, threshold: Threshold, **steps) -> dict[str, Any]:
    original = o.call["original_inference_steps"]
    trained = o["original_inference_steps"]
    return {
        "schedule": schedule_of(o),
        "parameterization": prediction_of(o),
        "threshold": threshold,
        "sampler": sampler,
        "steps": DistilledSteps(
            trained if original is None else original, o.call["strength"], **steps
        ),
    }


def _lcm(o: Options) -> dict[str, Any]:
    return _distilled(o, LCM(o["timestep_scaling"]), threshold_of(o))


def _tcd(o: Options) -> dict[str, Any]:
    o.only("clip_sample", "thresholding")
    every, eta = o.call["original_inference_steps"] is not None, o.call["eta"]
    return _distilled(o, TCD(eta), Unguided(), stage=eta, every=every, clean=False)


_DISTILLED = {
    **KARRAS_BETAS, "beta_schedule": "scaled_linear", "original_inference_steps": 50,
    **CLIP, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0,
    "prediction_type": "epsilon", **DYNAMIC, "timestep_spacing": "leading",
    "timestep_scaling": 10.0, **ZERO_SNR,
}  # fmt: skip
_DISTILLED_CALL = {"original_inference_steps": None, "strength": 1.0}
_DISTILLED_INERT = ("set_alpha_to_one", "steps_offset", "timestep_spacing")


CHAINS: dict[str, Kind] = {
    "DDPMScheduler": Kind(
        _ddpm,
        {**DISCRETE, "variance_type": "fixed_small", **CLIP, **DYNAMIC, **SPACED,
         "timestep_spacing": "leading", **ZERO_SNR},
    ),
    "DDIMScheduler": Kind(
        _ddim,
        {**DISCRETE, **CLIP, "set_alpha_to_one": True, **DYNAMIC, **SPACED,
         "timestep_spacing": "leading", **ZERO_SNR},
        {"eta": 0.0, "use_clipped_model_output": False},
    ),
    "DDIMInverseScheduler": Kind(
        _ddim_inverse,
        {**DISCRETE, **CLIP, "set_alpha_to_one": True, **SPACED,
         "timestep_spacing": "leading", **ZERO_SNR},
    ),
    "UnCLIPScheduler": Kind(
        _unclip,
        {"num_train_timesteps": 1000, "variance_type": "fixed_small_log", **CLIP,
         "prediction_type": "epsilon", "beta_schedule": "squaredcos_cap_v2"},
        {"prev_timestep": "next"},
    ),
    "PNDMScheduler": Kind(
        _pndm,
        {**DISCRETE, "skip_prk_steps": False, "set_alpha_to_one": False, **SPACED,
         "timestep_spacing": "leading"},
    ),
    "IPNDMScheduler": Kind(
        _ipndm,
        {"num_train_timesteps": 1000, "trained_betas": None},
        inert=("num_train_timesteps",),
    ),
    "RePaintScheduler": Kind(
        _repaint,
        {**DISCRETE, "eta": 0.0, "clip_sample": True},
        {"jump_length": 10, "jump_n_sample": 10},
    ),
    "LCMScheduler": Kind(_lcm, _DISTILLED, _DISTILLED_CALL, _DISTILLED_INERT),
    "TCDScheduler": Kind(
        _tcd,
        _DISTILLED,
        {**_DISTILLED_CALL, "eta": 0.3},
        (*_DISTILLED_INERT, "clip_sample_range", "dynamic_thresholding_ratio",
         "sample_max_value", "timestep_scaling"),
    ),
}  # fmt: skip
