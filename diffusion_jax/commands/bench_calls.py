"""Network calls of samplers, counted while they run, and the most steps that some allow."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.core.arrays import as_arrays, image_keys
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.types import Array, Key, NoiseLevel, Prediction
from diffusion_jax.samplers import Sampler, sample


class Counted:
    """A sampler's runs, with the network calls that really happen counted on the host.

    Calls in branches that are not taken do not count, calls that are computed and thrown away do.
    One compilation for each structure of sampler serves all schedules, grids and steps.
    """

    def __init__(self, denoise: Callable[[Array, NoiseLevel], Prediction]):
        self.calls, self._denoise = 0, denoise
        self._compiled = jax.jit(self._run)

    def _increment(self) -> None:
        self.calls += 1

    def _run(self, sampler: Sampler, grid: Grid, x_T: Array, keys: Key) -> Array:
        def denoise(x, level):
            jax.debug.callback(self._increment)
            return self._denoise(x, level)

        return sample(sampler, denoise, grid, x_T, keys)[0]

    def __call__(self, sampler: Sampler, grid: Grid, x_T: Array, keys: Key) -> tuple[Array, int]:
        """The sample [B, ...] and how often the network was called."""
        self.calls = 0
        x = jax.block_until_ready(self._compiled(*as_arrays((sampler, grid)), x_T, keys))
        jax.effects_barrier()
        return x, self.calls


def _shrinking(x: Array, level: NoiseLevel) -> Prediction:
    del level
    return Prediction(0.5 * x)


class Steps:
    """Finds the most steps that stay within a number of network calls, by counting them."""

    def __init__(self) -> None:
        self._probe = Counted(_shrinking)
        self._x, self._keys = jnp.ones((1, 1)), image_keys(0, range(1))
        self._guesses: dict[Any, int] = {}

    def calls(self, sampler: Sampler, grid: Grid) -> int:
        """Network calls of one run over a grid."""
        return self._probe(sampler, grid, self._x, self._keys)[1]

    def most(self, sampler: Sampler, make: Callable[[int], Grid], nfe: int, hint: Any) -> int:
        """The largest N whose run calls the network at most `nfe` times; 0 if there is none.

        Args:
          make: N -> grid.
          hint: runs with the same hint are expected to need the same N, which is then counted
            first.
        """
        counted: dict[int, int] = {}

        def fits(num_steps: int) -> bool:
            if num_steps not in counted:
                counted[num_steps] = self.calls(sampler, make(num_steps))
            return counted[num_steps] <= nfe

        # Every step calls the network, so nfe + 1 steps are too many.
        low, high = 0, nfe + 1
        guess = self._guesses.get(hint, nfe)
        while high - low > 1:
            if fits(guess):
                low = guess
                # One step more is at least one call more.
                high = min(high, low + 1 + nfe - counted[low])
                guess = low + 1
            else:
                high = guess
                guess = (low + high) // 2
            if not low < guess < high:
                guess = (low + high) // 2
        self._guesses[hint] = low
        return low
