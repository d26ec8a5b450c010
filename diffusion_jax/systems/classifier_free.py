"""Classifier-free guidance: a class-conditional model that is also unconditional."""

from dataclasses import dataclass, replace

from diffusion_jax.conditioners import label, with_dropout
from diffusion_jax.guidance import Chain, ClassifierFree, Unguided
from diffusion_jax.systems.cascade import System, single
from diffusion_jax.systems.ddpm import DDPMSystem
from diffusion_jax.systems.parts import GuidancePart
from diffusion_jax.systems.stage import diffusion_stage, ends_without_signal


@dataclass(frozen=True)
class ClassifierFreeSystem(DDPMSystem):
    """DDPM with a class label that is dropped at random in training.

    Attributes:
      num_classes: labels are 0 … num_classes - 1.
      label_dropout: probability of training an example without its label.
      guidance: applied before the threshold.

    Source: Ho & Salimans 2022 (arXiv:2207.12598).
    """

    num_classes: int = 10
    label_dropout: float = 0.1
    guidance: GuidancePart = ClassifierFree(scale=1.5)

    def build(self) -> System:
        """The system's functions.

        Raises:
          ValueError: if the parts do not fit each other.
        """
        conditioner = with_dropout(
            label(self.num_classes, self.network.embed_dim), self.label_dropout
        )
        return single(diffusion_stage(conditioner=conditioner, guide=self.guide(), **self.parts()))

    def guide(self, scale: float | None = None) -> Chain:
        """Guidance, then threshold; `scale` replaces the configured one.

        Raises:
          ValueError: if a scale is given and the guidance has none, or it is of another system.
        """
        guidance = self.guidance
        if not isinstance(guidance, Unguided | ClassifierFree):
            raise ValueError(
                f"this system has no classifier for {type(guidance).__name__}; choose the "
                "guidance 'classifier_free' or 'none'"
            )
        rescaled_eps = getattr(guidance, "rescale_in", None) == "eps"
        if rescaled_eps and ends_without_signal(self.schedule):
            raise ValueError(
                "rescale_in 'eps' divides by alpha, which is 0 at the end of this schedule; "
                "choose 'v' or 'x0'"
            )
        if scale is not None:
            if isinstance(guidance, Unguided):
                raise ValueError(f"{type(guidance).__name__} has no scale to set to {scale}")
            guidance = replace(guidance, scale=float(scale))
        return Chain((guidance, self.threshold))
