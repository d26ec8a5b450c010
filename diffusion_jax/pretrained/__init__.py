"""What other libraries released, read into the parts of this one."""

from diffusion_jax.pretrained.schedulers import Scheduler, from_config, to_config

__all__ = ["Scheduler", "from_config", "to_config"]
