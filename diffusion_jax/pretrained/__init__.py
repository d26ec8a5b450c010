"""What other libraries released, read into the parts of this one, and written as they read it."""

from diffusion_jax.pretrained.components import COMPONENTS, ORIGINALS, Component
from diffusion_jax.pretrained.folder import from_pretrained, save_pretrained
from diffusion_jax.pretrained.hub import HubError
from diffusion_jax.pretrained.lora import load_lora, save_lora, with_lora
from diffusion_jax.pretrained.networks import Loaded, UnknownClassError
from diffusion_jax.pretrained.originals import from_original, save_original
from diffusion_jax.pretrained.pipelines import Pipeline
from diffusion_jax.pretrained.published import PUBLISHED, Published
from diffusion_jax.pretrained.runs import Trained
from diffusion_jax.pretrained.schedulers import Scheduler, from_config, to_config
from diffusion_jax.pretrained.toy import toy_pipeline

__all__ = [
    "COMPONENTS",
    "ORIGINALS",
    "PUBLISHED",
    "Component",
    "HubError",
    "Loaded",
    "Pipeline",
    "Published",
    "Scheduler",
    "Trained",
    "UnknownClassError",
    "from_config",
    "from_original",
    "from_pretrained",
    "load_lora",
    "save_lora",
    "save_original",
    "save_pretrained",
    "to_config",
    "toy_pipeline",
    "with_lora",
]
