"""DDPM: unconditional diffusion in pixel space."""

from dataclasses import dataclass, field

from diffusion_jax.conditioners import UNCONDITIONAL
from diffusion_jax.core.parameterization import Eps
from diffusion_jax.core.schedules import Linear
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.guidance import StaticThreshold
from diffusion_jax.losses import ScheduleTimes, Simple
from diffusion_jax.models import UNetConfig
from diffusion_jax.samplers import DDPM
from diffusion_jax.systems.cascade import System, single
from diffusion_jax.systems.parts import (
    LossPart,
    NetworkPart,
    ParameterizationPart,
    SamplerPart,
    SchedulePart,
    ThresholdPart,
    TimesPart,
    time_input,
)
from diffusion_jax.systems.stage import diffusion_stage


@dataclass(frozen=True)
class DDPMSystem:
    """One network that denoises images, sampled from pure noise.

    Attributes:
      image_size: height and width in pixels.
      channels: 1 for grey, 3 for RGB.
      network: what predicts; its number of output channels must be `channels`.
      schedule: from data to noise.
      parameterization: what the network predicts.
      time_input: what the network is told about the level: "t", "rescaled_t", "scaled_t" or
        "edm", see `parts.time_input`.
      loss: what the network is trained with; "hybrid" and "vlb" learn the variance, and the
        network then has twice as many output channels.
      times: how times are drawn in training.
      sampler: used where a call gives none.
      steps: the grid used where a call gives none.
      threshold: applied to every x̂0; the released DDPM code clips.
      dtype: of the network's activations, "float32" or "bfloat16"; parameters stay float32.

    Source: Ho et al. 2020 (arXiv:2006.11239).
    """

    image_size: int = 32
    channels: int = 3
    network: NetworkPart = field(default_factory=UNetConfig)
    schedule: SchedulePart = Linear()
    parameterization: ParameterizationPart = Eps()
    time_input: str = "t"
    loss: LossPart = Simple()
    times: TimesPart = ScheduleTimes()
    sampler: SamplerPart = DDPM(variance="large")
    steps: Steps = Steps(num_steps=1000)
    threshold: ThresholdPart = StaticThreshold()
    dtype: str = "float32"

    def build(self) -> System:
        """The system's functions.

        Raises:
          ValueError: if the parts do not fit each other.
        """
        return single(
            diffusion_stage(conditioner=UNCONDITIONAL, guide=self.threshold, **self.parts())
        )

    def parts(self) -> dict:
        """The arguments of `diffusion_stage` that do not depend on the condition."""
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")
        return {
            "network": self.network.build(dtype=self.dtype),
            "schedule": self.schedule,
            "parameterization": self.parameterization,
            "time_input": time_input(self.time_input, self.schedule),
            "loss": self.loss,
            "times": self.times,
            "sampler": self.sampler,
            "grid": self.steps.grid(self.schedule),
            "shape": (self.image_size, self.image_size, self.channels),
        }
