"""RePaint: inpainting with any sampler and an unconditional network, by keeping known pixels."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import fold_in_each, per_image_normal
from diffusion_jax.core.forward import add_noise, transition
from diffusion_jax.core.types import Array, Key, NoiseLevel
from diffusion_jax.samplers.base import Denoise, Sampler, StepInfo

MERGES = ("after", "before")

# The wrapped sampler draws from the keys of the step and from small numbers folded into them.
_KNOWN_REGION = 0xFFFFFFFE


@struct.dataclass
class RePaint:
    """Keeps known pixels on the path while a sampler fills in the others.

    A step to a cleaner level s is the sampler's own, after which the known region is replaced by
    a draw of q(x_s | x0 = known), which is `known` itself at sigma = 0. A step to a noisier level
    s of the grid, made by `core.grid.jumps`, draws x_s of q(x_s | x_t) and lets the sampler begin
    anew: so known and generated pixels get to agree. Without such jumps this is plain replacement,
    whose result depends too little on what is known; with them it is better but not exact.

    Attributes:
      sampler: takes the steps to cleaner levels.
      known: [B, ...] like x, clean data; its unknown pixels are not read.
      mask: bool, of x's rank and broadcasting to it; True = known.
      merge: "after": known pixels are put in after each step, at its end (the paper, and exact in
        the last step). "before": before each step, at its start, so that the last word on known
        pixels is the network's (latent diffusion, GLIGEN, RePaint's released code).
      share_noise: noise the known region with the noise that the sampler adds to the rest, as
        diffusers does, instead of noise of its own.

    Raises:
      ValueError: if merge is unknown, the mask is not bool or does not fit x, or known has not
        x's shape.

    Source: Lugmayr et al. 2022 (arXiv:2201.09865), algorithm 1, with √(1 - ᾱ) in its line 5.
    """

    sampler: Sampler
    known: Array
    mask: Array
    merge: str = struct.field(pytree_node=False, default="after")
    share_noise: bool = struct.field(pytree_node=False, default=False)

    def __post_init__(self):
        if self.merge not in MERGES:
            raise ValueError(f"merge must be one of {MERGES}, got {self.merge!r}")

    @property
    def middle(self) -> Any:
        """Where inside of a step the sampler evaluates the network, see `fit_grid`."""
        return getattr(self.sampler, "middle", None)

    def validate(self) -> None:
        """Checks the knobs of the sampler; for values, not tracers."""
        if hasattr(self.sampler, "validate"):
            self.sampler.validate()

    def init(self, x_T: Array) -> Any:
        mask = jnp.asarray(self.mask)
        if mask.dtype != jnp.bool_:
            raise ValueError(
                f"mask must be bool with True = known, got {mask.dtype}; compare it with a "
                "threshold, such as mask > 0.5"
            )
        fits = mask.ndim == x_T.ndim and all(
            mine in (1, size) for mine, size in zip(mask.shape, x_T.shape, strict=True)
        )
        if self.known.shape != x_T.shape or not fits:
            raise ValueError(
                f"known must have the shape of x and mask must broadcast to it: x {x_T.shape}, "
                f"known {self.known.shape}, mask {mask.shape}"
            )
        return self.sampler.init(x_T)

    def _merged(self, x: Array, keys: Key, level: NoiseLevel) -> Array:
        keys = keys if self.share_noise else fold_in_each(keys, _KNOWN_REGION)
        known = add_noise(self.known.astype(x.dtype), per_image_normal(keys, x), level)
        return jnp.where(self.mask, known, x)

    def step(
        self,
        keys: Key,
        denoise: Denoise,
        state: Any,
        level: NoiseLevel,
        next_level: NoiseLevel,
        info: StepInfo,
    ) -> Any:
        def upwards(state):
            alpha, std = transition(next_level, level)
            return self.sampler.init(alpha * state.x + std * per_image_normal(keys, state.x))

        def downwards(state):
            if self.merge == "before":
                state = state.replace(x=self._merged(state.x, keys, level))
            state = self.sampler.step(keys, denoise, state, level, next_level, info)
            if self.merge == "after":
                state = state.replace(x=self._merged(state.x, keys, next_level))
            return state

        # Multiplied out, so that sigma = 0 and alpha = 0 are no special cases.
        is_up = next_level.sigma * level.alpha > level.sigma * next_level.alpha
        return jax.lax.cond(is_up, upwards, downwards, state)
