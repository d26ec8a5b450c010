"""Calls: the words of diffusers' pipelines, checked and turned into phases and arrays."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.pretrained.calls import (
    deepfloyd,
    gligen,
    latent_diffusion,
    sdxl,
    unclip,
    unconditional,
    upscaling,
)
from diffusion_jax.pretrained.calls.base import Drawn, Job, Progress, Task, choose
from diffusion_jax.pretrained.calls.image_to_image import IMAGE_TO_IMAGE, INPAINTING, REPAINT
from diffusion_jax.pretrained.calls.stable_diffusion import TEXT_TO_IMAGE

_STABLE_DIFFUSION = (INPAINTING, IMAGE_TO_IMAGE, TEXT_TO_IMAGE)
_SDXL = (sdxl.INPAINTING, sdxl.IMAGE_TO_IMAGE, sdxl.TEXT_TO_IMAGE)

# Class of a pipeline -> what it can be called for; the first task whose needs are given is done.
TASKS: Mapping[str, tuple[Task, ...]] = {
    "DDIMPipeline": (unconditional.DDIM,),
    "DDPMPipeline": (unconditional.DDPM,),
    "DiTPipeline": (unconditional.DIT,),
    "LDMSuperResolutionPipeline": (latent_diffusion.SUPER_RESOLUTION,),
    "LDMTextToImagePipeline": (latent_diffusion.TEXT_TO_IMAGE,),
    "PNDMPipeline": (unconditional.PNDM,),
    "StableDiffusionUpscalePipeline": (upscaling.UPSCALE,),
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "StableDiffusionXLInpaintPipeline": _SDXL,
    "StableDiffusionXLPipeline": _SDXL,
    "IFPipeline": (deepfloyd.BASE,),
    "IFSuperResolutionPipeline": (deepfloyd.SUPER_RESOLUTION,),
    "RePaintPipeline": (REPAINT,),
    "StableDiffusionGLIGENPipeline": (gligen.TEXT_BOXES, *_STABLE_DIFFUSION),
    "StableDiffusionGLIGENTextImagePipeline": (gligen.TEXT_IMAGE_BOXES, *_STABLE_DIFFUSION),
    "StableDiffusionImg2ImgPipeline": _STABLE_DIFFUSION,
    "StableDiffusionInpaintPipeline": _STABLE_DIFFUSION,
    "StableDiffusionPipeline": _STABLE_DIFFUSION,
    "UnCLIPPipeline": (unclip.TEXT_TO_IMAGE,),
}


def tasks_of(class_name: str) -> tuple[Task, ...]:
    """What pipelines of a class can be called for.

    Raises:
      ValueError: if they cannot be called.
    """
    if class_name not in TASKS:
        raise ValueError(
            f"a {class_name} cannot be called; its parts can be used one by one. Classes that can "
            f"be: {', '.join(sorted(TASKS))}"
        )
    return TASKS[class_name]


def task_of(class_name: str, words: Mapping[str, Any]) -> Task:
    """The task that the words of a call choose among those of a pipeline's class.

    Raises:
      ValueError: if pipelines of the class cannot be called, or the words choose none.
    """
    return choose(tasks_of(class_name), class_name, words)


__all__ = ["TASKS", "Drawn", "Job", "Progress", "Task", "task_of", "tasks_of"]
