"""RePaint: the known region, steps upwards, and a Gaussian whose conditional law is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import struct
from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.repaint_grid import single_step_jumps
from diffusion_jax.core.schedules import Cosine, CosineLogSNR, Linear, adm_linear
from diffusion_jax.core.timesteps import Grid, jumps, linspace
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.samplers import DDIM, DDPM, StepInfo, sample
from diffusion_jax.samplers.repaint import RePaint
from tests.analytic import MIXTURE
from tests.noise import drawn_by

CORRELATION = 0.9
COVARIANCE = 0.25 * np.asarray([[1.0, CORRELATION], [CORRELATION, 1.0]])
FIRST = jnp.asarray([[True, False]])
KEYS = image_keys(0, range(4))
KNOWN = jnp.asarray([[0.3, 5.0], [-0.7, 5.0], [1.0, 5.0], [0.1, 5.0]], jnp.float32)
X = jnp.asarray([[0.9, -1.4], [0.1, 2.0], [-0.3, 0.4], [1.0, 1.5]], jnp.float32)


def correlated(x, level):
    """The exact denoiser of N(0, COVARIANCE)."""
    covariance = jnp.asarray(COVARIANCE, x.dtype)
    total = level.alpha**2 * covariance + level.sigma**2 * jnp.eye(2, dtype=x.dtype)
    return Prediction(x @ (level.alpha * covariance @ jnp.linalg.inv(total)).T)


@functools.partial(jax.jit, static_argnames="denoise")
def paint(sampler, denoise, grid, x, keys):
    return sample(sampler, denoise, grid, x, keys, trace=lambda state: state.x)


def path(num_steps, jump_length, num_resamples):
    grid = linspace(adm_linear(num_steps), num_steps, max_steps=num_steps)
    longest = {50: 1000, 250: 4570}[num_steps]
    return jumps(grid, jump_length=jump_length, num_resamples=num_resamples, max_steps=longest)


# (T, jump length, resamples) -> slope of the painted coordinate on the known one.
SLOPES = {(250, 1, 1): 0.620, (250, 10, 10): 0.861, (50, 1, 1): 0.586, (50, 1, 10): 0.847,
          (50, 10, 10): 0.66}  # fmt: skip


@pytest.mark.parametrize("total, length, count", SLOPES)
def test_slope_of_the_painted_coordinate(total, length, count, x64):
    """Replacement alone is far from the conditional mean 0.9 · x1, resampling comes near it."""
    sampler = RePaint(DDPM("small"), jnp.ones((1, 2)), FIRST)
    # Every step is affine, so without noise the result is the mean.
    with drawn_by(lambda keys, x: jnp.zeros_like(x)):
        x, _ = paint(sampler, correlated, path(total, length, count), jnp.zeros((1, 2)), KEYS[:1])
    assert float(x[0, 0]) == 1.0
    assert abs(float(x[0, 1]) - SLOPES[total, length, count]) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("length, count, ratio", [(1, 1, 1.545), (10, 10, 0.996)])
def test_variance_of_the_painted_coordinate(length, count, ratio):
    """Its residual variance over the conditional one; RePaint's is right, replacement's is not."""
    keys = image_keys(0, range(2048))
    known = jnp.concatenate([0.5 * jax.random.normal(jax.random.key(1), (2048, 1))] * 2, axis=1)
    sampler = RePaint(DDPM("small"), known, FIRST)
    x_T = jax.random.normal(jax.random.key(2), (2048, 2))
    x = np.asarray(paint(sampler, correlated, path(250, length, count), x_T, keys)[0])
    slope = np.sum(x[:, 0] * x[:, 1]) / np.sum(x[:, 0] ** 2)
    residual = np.var(x[:, 1] - slope * x[:, 0]) / (0.25 * (1 - CORRELATION**2))
    assert abs(residual / ratio - 1) < 0.1


def test_known_pixels_stay_on_the_path():
    """After every step they are α known + σ z, exact at the end; other pixels are not read."""
    grid = jumps(linspace(Cosine(), 6, max_steps=6), jump_length=2, num_resamples=2, max_steps=20)
    sampler = RePaint(DDIM(), KNOWN.at[:, 1].set(jnp.nan), FIRST)
    with drawn_by(lambda keys, x: jnp.full_like(x, 0.5)):
        x, xs = paint(sampler, MIXTURE.denoise, grid, X, KEYS)
    end = NoiseLevel(*(np.asarray(field)[1:] for field in grid.levels))
    expected = end.alpha[:, None] * np.asarray(KNOWN)[:, 0] + 0.5 * end.sigma[:, None]
    downwards = np.diff(np.asarray(grid.levels.sigma)) < 0
    assert 8 < downwards.sum() < int(grid.stop)
    np.testing.assert_allclose(xs[downwards, :, 0], expected[downwards], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(x[:, 0], KNOWN[:, 0])
    assert np.all(np.isfinite(x)) and len(set(np.asarray(x[:, 1]))) == 4


def grid_of(times):
    """A grid that starts its steps at these times, in any order, and ends at the last one."""
    levels = Cosine()(np.asarray([*times, *[times[-1]] * (7 - len(times))]))
    levels = NoiseLevel(*(jnp.asarray(field, jnp.float32) for field in levels))
    return Grid(levels, jnp.int32(0), jnp.int32(len(times) - 1))


@struct.dataclass
class History:
    x: jax.Array
    x0: jax.Array


class Remembering:
    """A sampler whose step depends on the x0 of the step before."""

    def init(self, x_T):
        return History(x_T, jnp.zeros_like(x_T))

    def step(self, keys, denoise, state, level, next_level, info):
        x0 = denoise(state.x, level).x0
        eps = (state.x - level.alpha * x0) / level.sigma
        x = next_level.alpha * (x0 + 0.3 * state.x0) + next_level.sigma * eps
        return History(x, x0)


jax.tree_util.register_static(Remembering)


def test_a_step_upwards_noises_and_forgets():
    """Down, up and down with memory = two runs of it with q(x_t | x_s) in between."""
    inner = Remembering()
    sampler = RePaint(inner, KNOWN, jnp.zeros((1, 2), bool))
    there_and_back = grid_of([900.0, 600.0, 300.0, 900.0, 600.0, 300.0])
    with drawn_by(lambda keys, x: jnp.full_like(x, 0.7)):
        x, _ = paint(sampler, MIXTURE.denoise, there_and_back, X, KEYS)
    down = grid_of([900.0, 600.0, 300.0])
    middle, _ = paint(inner, MIXTURE.denoise, down, X, KEYS)
    alphas_cumprod = Cosine().alphas_cumprod()
    keep = float(alphas_cumprod[900] / alphas_cumprod[300])
    middle = keep**0.5 * middle + (1 - keep) ** 0.5 * 0.7
    expected, _ = paint(inner, MIXTURE.denoise, down, middle, KEYS)
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-5)


def one_step(sampler):
    level, end = (
        NoiseLevel(*(jnp.float32(f) for f in Cosine()(np.asarray(t)))) for t in (600.0, 300.0)
    )
    return sampler.step(KEYS, MIXTURE.denoise, sampler.init(X), level, end, StepInfo(0, 0, 1)).x, (
        level,
        end,
    )


def test_merging_before_the_step_leaves_the_last_word_to_the_network():
    inner = DDIM()
    with drawn_by(lambda keys, x: jnp.full_like(x, 0.5)):
        x, (level, end) = one_step(RePaint(inner, KNOWN, FIRST, merge="before"))
    merged = X.at[:, 0].set(level.alpha * KNOWN[:, 0] + level.sigma * 0.5)
    expected = inner.step(
        KEYS, MIXTURE.denoise, inner.init(merged), level, end, StepInfo(0, 0, 1)
    ).x
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-6)


def test_noise_of_the_known_region_is_its_own_or_shared():
    """With mask and its complement, the noise that each half was given can be read off."""

    def noise_of(**options):
        x, (_, end) = one_step(RePaint(DDIM(), KNOWN, FIRST, **options))
        return np.asarray((x[:, 0] - end.alpha * KNOWN[:, 0]) / end.sigma)

    drawn = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (2,)))(KEYS))[:, 0]
    np.testing.assert_allclose(noise_of(share_noise=True), drawn, rtol=0, atol=1e-5)
    assert np.abs(noise_of() - drawn).min() > 1e-3


def test_mask_and_image_are_data():
    """Other masks, images and jumps share one compilation."""
    before = paint._cache_size()
    grid = linspace(Cosine(), 6, max_steps=6)
    for count, mask in ((1, FIRST), (2, ~FIRST)):
        several = jumps(grid, jump_length=2, num_resamples=count, max_steps=21)
        paint(RePaint(DDPM(), count * KNOWN, mask), MIXTURE.denoise, several, X, KEYS)
    assert paint._cache_size() == before + 1


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RePaint(DDIM(), KNOWN, FIRST, merge="end"), r"\('after', 'before'\), got 'end'"),
        (
            lambda: RePaint(DDIM(), KNOWN, jnp.ones((1, 2))).init(X),
            "True = known, got float32",
        ),
        (lambda: RePaint(DDIM(), KNOWN[:1], FIRST).init(X), r"known \(1, 2\)"),
        (lambda: RePaint(DDIM(), KNOWN, FIRST[0]).init(X), r"mask \(2,\)"),
        (lambda: RePaint(DDIM(), KNOWN, jnp.ones((4, 3), bool)).init(X), r"mask \(4, 3\)"),
        (lambda: RePaint(DDIM(2.0), KNOWN, FIRST).validate(), r"\[0, 1\], got 2.0"),
        (
            lambda: single_step_jumps(CosineLogSNR(), 4, jump_length=1, num_resamples=1),
            "CosineLogSNR is continuous; use jumps",
        ),
        (
            lambda: single_step_jumps(
                Linear(8, 0.1, 0.4), 4, jump_length=1, num_resamples=2, max_steps=9
            ),
            "13 exceeds max_steps = 9",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_single_step_jumps_of_published_code():
    """T = 8, N = 4, j = 1, n = 2, by hand: network times 6 4 6 4 2 4 2 0 2 0, where the path
    ascends by two steps of training, from the time before on."""
    schedule = Linear(8, 0.1, 0.4)
    grid = single_step_jumps(schedule, 4, jump_length=1, num_resamples=2, max_steps=15)
    pairs = [(6, 4), (4, 2), (3, 4), (4, 5), (4, 2), (2, 0), (1, 2), (2, 3), (2, 0), (0, -1),
             (-1, 0), (0, 1), (0, -1), (-1, -1), (-1, -1)]  # fmt: skip
    assert int(grid.stop) == 13
    for levels, times in zip((grid.levels, grid.ends), zip(*pairs, strict=True), strict=True):
        alphas_cumprod = np.append(schedule.alphas_cumprod(), 1.0)[list(times)]
        np.testing.assert_allclose(levels.alpha[:15] ** 2, alphas_cumprod, rtol=1e-6)
        np.testing.assert_allclose(levels.sigma[:15] ** 2, 1 - alphas_cumprod, rtol=1e-5)
    assert grid.levels.t.shape == (16,) and grid.ends.t.shape == (15,)
