"""Classifier guidance: a diffusion model, and a classifier of noisy images that steers it."""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from diffusion_jax.conditioners import UNCONDITIONAL, label
from diffusion_jax.core import struct
from diffusion_jax.core.arrays import as_arrays
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.types import Array, Batch, DenoiseFn, Key, LogProb, Params
from diffusion_jax.guidance import Chain, ClassifierGuidance, Guide, Unguided
from diffusion_jax.losses.classifier import (
    NoisyCrossEntropy,
    averaged_over_times,
    classifier_log_prob,
)
from diffusion_jax.models import MLPClassifierConfig
from diffusion_jax.samplers import MeanShift, Sampler
from diffusion_jax.systems.cascade import System
from diffusion_jax.systems.ddpm import DDPMSystem
from diffusion_jax.systems.parts import ClassifierPart, time_input
from diffusion_jax.systems.stage import (
    Stage,
    check_image,
    diffusion_stage,
    ends_without_signal,
    validate,
)


@struct.dataclass
class _Bound:
    """Classifier guidance as a guide: its log-probability is known."""

    guidance: ClassifierGuidance
    log_prob: LogProb = struct.field(pytree_node=False)

    def __call__(self, denoise: DenoiseFn, uncond: Condition) -> DenoiseFn:
        del uncond
        return self.guidance(denoise, self.log_prob)


@dataclass(frozen=True)
class ClassifierGuidanceSystem(DDPMSystem):
    """DDPM with a second stage, a classifier of noisy images, whose gradient guides sampling.

    As in the released code x̂0 is thresholded before guidance and not after it.

    Attributes:
      num_classes: labels are 0 … num_classes - 1.
      class_conditional: whether the diffusion model is told the label too.
      classifier: p(y | x_t), trained on the same schedule.
      classifier_loss: what it is trained with.
      guidance: scale and form.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4.
    """

    num_classes: int = 10
    class_conditional: bool = True
    classifier: ClassifierPart = MLPClassifierConfig()
    classifier_loss: NoisyCrossEntropy = NoisyCrossEntropy()
    guidance: Unguided | ClassifierGuidance = ClassifierGuidance()

    def build(self) -> System:
        """The system's functions.

        Raises:
          ValueError: if the parts do not fit each other.
        """
        if self.classifier.num_classes != self.num_classes:
            raise ValueError(
                f"the classifier has {self.classifier.num_classes} classes, the system "
                f"{self.num_classes}; set both"
            )
        self._check_guidance(self.guidance, self.sampler)
        validate(self.guidance)
        parts = self.parts()
        conditioner = UNCONDITIONAL
        if self.class_conditional:
            conditioner = label(self.num_classes, self.network.embed_dim, null=False)
        base = diffusion_stage(conditioner=conditioner, guide=self.threshold, **parts)

        def sample(params, batch, keys, *, guide=None, sampler=None, grid=None):
            guidance = as_arrays(self.guidance if guide is None else guide)
            sampler = as_arrays(self.sampler if sampler is None else sampler)
            self._check_guidance(guidance, sampler)
            log_prob = self.log_prob(params["classifier"], batch["label"])
            guides = (as_arrays(self.threshold),)
            if isinstance(guidance, ClassifierGuidance) and guidance.form == "mean":
                gradient = guidance.gradient(log_prob)
                sampler = MeanShift(sampler, lambda x, level: gradient(x, level, Condition()))
            elif isinstance(guidance, ClassifierGuidance):
                guides += (_Bound(guidance, log_prob),)
            return base.sample(
                params["base"], batch, keys, guide=Chain(guides), sampler=sampler, grid=grid
            )

        stages = {"base": base, "classifier": self._classifier_stage(parts["shape"])}
        return System(stages, sample, self.guidance, self.sampler, base.grid)

    def log_prob(self, params: Params, labels: Array) -> LogProb:
        """(x_t, level, cond) -> log p(y | x_t) [B] of the classifier stage's parameters.

        Args:
          params: of the stage "classifier".
          labels: [B] int.
        """
        bind = classifier_log_prob(
            self._classify,
            self.parameterization,
            time_input=time_input(self.time_input, self.schedule),
        )
        return bind(params["network"], labels)

    def guide(self, scale: float | None = None) -> Unguided | ClassifierGuidance:
        """The guidance; `scale` replaces the configured one.

        Raises:
          ValueError: if a scale is given and the guidance has none.
        """
        if scale is None:
            return self.guidance
        if not isinstance(self.guidance, ClassifierGuidance):
            raise ValueError(f"{type(self.guidance).__name__} has no scale to set to {scale}")
        return replace(self.guidance, scale=float(scale))

    def _check_guidance(self, guidance: Guide, sampler: Sampler) -> None:
        if isinstance(guidance, Unguided):
            return
        if not isinstance(guidance, ClassifierGuidance):
            raise ValueError(
                f"this system is guided by its classifier, got {type(guidance).__name__}; "
                "choose the guidance 'classifier' or 'none'"
            )
        if guidance.form == "mean":
            # Refuses samplers that have no mean to shift.
            MeanShift(sampler, lambda x, level: x)
        elif ends_without_signal(self.schedule):
            raise ValueError(
                "classifier guidance in the form 'score' divides by alpha, which is 0 at the end "
                "of this schedule; choose the form 'mean' or another schedule"
            )

    def _classify(self, params, x, t, cond, *, keys=None):
        network = self.classifier.build(dtype=self.dtype)
        return network.apply({"params": params}, x, t, cond, keys=keys)

    def _classifier_stage(self, shape: tuple[int, ...]) -> Stage:
        loss = self.classifier_loss.per_example(
            self._classify,
            self.schedule,
            self.parameterization,
            time_input=time_input(self.time_input, self.schedule),
        )
        loss = averaged_over_times(loss, self.schedule)

        def init(key: Key) -> Params:
            network = self.classifier.build(dtype=self.dtype)
            variables = network.init(key, jnp.zeros((1, *shape)), jnp.zeros(1), Condition())
            return {"network": variables["params"]}

        def stage_loss(params: Params, batch: Batch, keys: Key):
            check_image(batch["image"], shape)
            return loss(params["network"], batch["image"], batch["label"], keys)

        return Stage(init, stage_loss)
