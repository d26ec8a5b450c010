"""What other libraries released, read into the parts of this one, and written as they read it."""

from diffusion_jax.pretrained.components import COMPONENTS, Component
from diffusion_jax.pretrained.folder import from_pretrained, save_pretrained
from diffusion_jax.pretrained.hub import HubError
from diffusion_jax.pretrained.networks import Loaded, UnknownClassError
from diffusion_jax.pretrained.pipelines import Pipeline
from diffusion_jax.pretrained.runs import Trained
from diffusion_jax.pretrained.schedulers import Scheduler, from_config, to_config
from diffusion_jax.pretrained.settings import read_settings

__all__ = [
    "COMPONENTS",
    "Component",
    "HubError",
    "Loaded",
    "Pipeline",
    "Scheduler",
    "Trained",
    "UnknownClassError",
    "from_config",
    "from_pretrained",
    "read_settings",
    "save_pretrained",
    "to_config",
]
