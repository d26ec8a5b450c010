"""Encoding, inversion and slerp against exact flows, a published scheduler's formulas, geometry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.parameterization import Eps, V
from diffusion_jax.core.schedules import EDM, Linear
from diffusion_jax.core.timesteps import karras, trailing
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.guidance import StaticThreshold
from diffusion_jax.samplers import (
    DDIM,
    DDPM,
    LMS,
    PNDM,
    TCD,
    DPMSolverMultistep,
    Euler,
    EulerAncestral,
    Heun,
    HeunChurn,
    StepInfo,
    fit_grid,
)
from diffusion_jax.samplers.inversion import DDIMInversion, decode, encode, reverse, slerp
from diffusion_jax.samplers.kdpm2 import KDPM2
from tests.analytic import MIXTURE, gaussian, gaussian_flow, in_vp

DATA = gaussian(0.4, 0.3)
SIGMA_MIN, SIGMA_MAX = 0.1, 10.0
RATIOS = EDM(SIGMA_MIN, SIGMA_MAX)


def noisy_grid(num_steps):
    """A variance-preserving grid that ends at SIGMA_MIN, so that every step is of full order."""
    grid = karras(RATIOS, num_steps + 1, max_steps=129)
    return in_vp(grid._replace(stop=jnp.asarray(num_steps, jnp.int32)))


def ends(grid):
    return (
        NoiseLevel(*(np.asarray(field, np.float64)[i] for field in grid.levels))
        for i in (0, int(grid.stop))
    )


@functools.partial(jax.jit, static_argnames=("sampler", "back"))
def there_and_back(sampler, back, grid, x):
    noise = encode(sampler, DATA.denoise, grid, x)
    return noise, decode(back, DATA.denoise, grid, noise)


ORDERS = {
    "ddim": (DDIM(), DDIM(), 1),
    "euler": (Euler(), Euler(), 1),
    "heun": (Heun(), Heun(), 2),
    "dpm_solver_pp_2m": (DPMSolverMultistep(), DPMSolverMultistep(), 2),
    "inversion": (DDIMInversion(), DDIM(), 1),
}


@pytest.mark.parametrize("name", ORDERS)
def test_encoding_converges_to_the_exact_noise(name, x64):
    """And decoding that noise gives the data back with the order of the solver, or a higher one."""
    sampler, back, order = ORDERS[name]
    x = jnp.linspace(-0.6, 1.4, 6)[:, None]
    error, around = [], []
    for num_steps in (32, 64, 128):
        grid = noisy_grid(num_steps)
        start, end = ends(grid)
        exact = gaussian_flow(np.asarray(x), end, start, mean=0.4, std=0.3)
        noise, returned = there_and_back(sampler, back, grid, x)
        error.append(np.abs(noise - exact).max())
        around.append(np.abs(returned - x).max())
    slopes = np.log2(np.asarray(error[:-1]) / error[1:])
    assert abs(slopes[-1] - order) < 0.15, slopes
    assert np.log2(around[-2] / around[-1]) > order - 0.15, around
    assert error[-1] < (0.1 if order == 1 else 1e-3)


MIDDLE = {"kdpm2": (KDPM2(), 2), "lms": (LMS(2, start="runge_kutta"), 2)}


@pytest.mark.parametrize("name", MIDDLE)
def test_samplers_with_levels_inside_of_their_steps_encode(name, x64):
    """On grids of `fit_grid`, whose middles are those of the reversed steps too."""
    sampler, order = MIDDLE[name]
    x, error = jnp.linspace(-0.6, 1.4, 6)[:, None], []
    for num_steps in (32, 64, 128):
        grid = fit_grid(sampler, noisy_grid(num_steps), RATIOS)
        start, end = ends(grid)
        exact = gaussian_flow(np.asarray(x), end, start, mean=0.4, std=0.3)
        error.append(np.abs(there_and_back(sampler, sampler, grid, x)[0] - exact).max())
    slopes = np.log2(np.asarray(error[:-1]) / error[1:])
    assert abs(slopes[-1] - order) < 0.15 and error[-1] < 3e-3, (slopes, error)


def test_middles_are_reversed_with_the_levels():
    """The middle of each step back lies between its two levels; so on a part, and from clean."""
    grid = fit_grid(KDPM2(), trailing(Linear(), 6, max_steps=8), Linear())
    for part, options in ((grid, {}), (grid.starting_at(2), {}), (grid, {"from_clean": True})):
        back = reverse(part, **options)
        for i in range(int(back.stop)):
            here, there = (float(back.level(j).sigma / back.level(j).alpha) for j in (i, i + 1))
            inside = back.middle_level(i)
            ratio = float(inside.sigma / inside.alpha)
            np.testing.assert_allclose(ratio, np.sqrt(here * there), rtol=1e-4)
        assert back.middle.t.shape == (8,)


def test_iterating_inverts_ddim_exactly(x64):
    """One iteration is off by a first-order error; the fixed point is the inverse itself."""
    grid, x = noisy_grid(64), jnp.linspace(-0.6, 1.4, 6)[:, None]
    off = {}
    for iterations in (1, 3, 40):
        _, returned = there_and_back(DDIMInversion(iterations), DDIM(), grid, x)
        off[iterations] = np.abs(returned - x).max()
    assert off[1] > 1e-2 > 1e-3 > off[3] > 1e-7 and off[40] < 1e-12


def test_encoding_from_clean_data():
    """From sigma = 0: α x at the first noisy level, or the step that DDIMInversion can take."""
    grid = karras(EDM(0.002, 80.0), 129, max_steps=129)
    x = jnp.linspace(-0.6, 1.4, 6)[:, None]
    start, end = ends(grid)
    exact = gaussian_flow(np.asarray(x), end, start, mean=0.4, std=0.3)
    noise, returned = there_and_back(Heun(), Heun(), grid, x)
    np.testing.assert_allclose(noise, exact, rtol=2e-3)
    np.testing.assert_allclose(returned, x, rtol=0, atol=2e-4)
    noise, returned = there_and_back(DDIMInversion(20), DDIM(), grid, x)
    np.testing.assert_allclose(returned, x, rtol=0, atol=2e-4)
    assert np.abs(noise).min() > 10.0


def test_reversed_grids():
    grid = trailing(Linear(), 5, max_steps=7)
    t = np.asarray(grid.levels.t)
    back, whole = reverse(grid), reverse(grid, from_clean=True)
    assert (int(back.start), int(back.stop), int(whole.stop)) == (0, 4, 5)
    np.testing.assert_array_equal(back.levels.t, [*t[4::-1], t[0], t[0], t[0]])
    np.testing.assert_array_equal(whole.levels.sigma[:6], grid.levels.sigma[5::-1])
    tail = reverse(grid.starting_at(2))
    assert int(tail.stop) == 2
    np.testing.assert_array_equal(tail.levels.t, [*t[4:1:-1], *[t[2]] * 5])
    ends_noisy = reverse(trailing(Linear(), 5, max_steps=7, final="t_min"))
    assert int(ends_noisy.stop) == 5


@pytest.mark.parametrize("clean_start", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_reference_inversion(prediction, clean_start):
    """diffusers' DDIMInverseScheduler in ᾱ, with x0 clipped at 0.5 and a step to t = 200."""
    alphas_cumprod = Linear().alphas_cumprod()
    at, as_ = 1.0 if clean_start else alphas_cumprod[120], alphas_cumprod[200]
    x = np.asarray([[0.9, -0.3], [0.2, -1.1]])
    output = np.tanh(0.7 * x - 1.3 * 0.2)
    if prediction == "epsilon":
        parameterization, eps = Eps(), output
        x0 = (x - np.sqrt(1 - at) * eps) / np.sqrt(at)
    else:
        parameterization = V()
        x0 = np.sqrt(at) * x - np.sqrt(1 - at) * output
        eps = np.sqrt(at) * output + np.sqrt(1 - at) * x
    expected = np.sqrt(as_) * np.clip(x0, -0.5, 0.5) + np.sqrt(1 - as_) * eps

    def network(x, level, cond):
        output = jnp.tanh(0.7 * x - 1.3 * level.t / 1000.0)
        return Prediction(parameterization.to_x0(output, x, level))

    clipped = StaticThreshold(0.5)(network, Condition())
    level, end = (NoiseLevel(*(jnp.float32(f) for f in (t, a**0.5, (1 - a) ** 0.5)))
                  for t, a in ((120.0, at), (200.0, as_)))  # fmt: skip
    sampler = DDIMInversion(variant="reference")
    state = sampler.init(jnp.asarray(x, jnp.float32))
    out = sampler.step(
        None, lambda x, level: clipped(x, level, Condition()), state, level, end, StepInfo(0, 0, 1)
    )
    np.testing.assert_allclose(out.x, expected, rtol=0, atol=3e-6)


def test_slerp_walks_along_the_great_circle():
    """A right angle and one of 60 degrees in a plane, each image with its own."""
    a = np.asarray([[[2.0], [0.0]], [[0.0], [3.0]]], np.float32)
    turned = 3.0 * np.asarray([[np.sin(np.pi / 3)], [np.cos(np.pi / 3)]])
    b = np.asarray([[[0.0], [2.0]], turned], np.float32)
    w = np.asarray([0.25, 0.5])
    out = np.asarray(slerp(a, b, w))[:, :, 0]
    angles = 0.25 * np.pi / 2, np.pi / 6
    np.testing.assert_allclose(out[0], [2 * np.cos(angles[0]), 2 * np.sin(angles[0])], atol=1e-6)
    np.testing.assert_allclose(out[1], [3 * np.sin(angles[1]), 3 * np.cos(angles[1])], atol=1e-6)
    np.testing.assert_allclose(slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(slerp(a, b, 1.0), b, atol=1e-6)


def test_slerp_keeps_the_length_of_noise():
    a, b = jax.random.normal(jax.random.key(0), (2, 3, 16, 16))
    norms = [np.linalg.norm(np.asarray(x).reshape(3, -1), axis=1) for x in (a, b)]
    for w in (0.2, 0.5, 0.9):
        length = np.linalg.norm(np.asarray(slerp(a, b, w)).reshape(3, -1), axis=1)
        np.testing.assert_allclose(length, (1 - w) * norms[0] + w * norms[1], rtol=0.1)
        assert np.all(length > 0.9 * np.minimum(*norms))


def test_slerp_of_parallel_opposite_and_empty_images():
    """Same direction and zeros: a straight line; opposite: half a turn, as long as its ends."""
    a = jnp.asarray([[1.0, 2.0, 2.0]] * 4)
    b = jnp.stack([2 * a[0], -a[0], jnp.zeros(3), a[0] * (1 + 1e-6)])
    half = np.asarray(slerp(a, b, 0.5))
    np.testing.assert_allclose(half[0], 1.5 * np.asarray(a[0]), rtol=1e-6)
    np.testing.assert_allclose(half[2], 0.5 * np.asarray(a[0]), rtol=1e-6)
    np.testing.assert_allclose(half[3], a[0], rtol=1e-5)
    assert abs(np.dot(half[1], a[0])) < 1e-5 and abs(np.linalg.norm(half[1]) - 3.0) < 1e-5
    np.testing.assert_allclose(slerp(a, b, 0.0)[1], a[1], atol=1e-5)
    np.testing.assert_allclose(slerp(a, b, 1.0)[1], b[1], atol=1e-5)
    # Near opposite directions the way is a half turn too, in the plane that they span.
    near = b.at[1].add(jnp.asarray([0.02, -0.01, 0.0]))
    assert 2.99 < np.linalg.norm(slerp(a, near, 0.5)[1]) < 3.01


def test_gradients_of_slerp_are_finite():
    """For equal, parallel, opposite and empty images too; at equal ones they are the weights."""
    a = jnp.asarray([[1.0, 2.0, 2.0]] * 5)
    b = jnp.stack([a[0], 3 * a[0], -a[0], jnp.zeros(3), a[0] + jnp.asarray([0.0, 0.0, 0.5])])
    for first, second in ((a, b), (b, a), (jnp.zeros_like(a), jnp.zeros_like(b))):
        slopes = jax.grad(lambda *x: slerp(*x, 0.25).sum(), argnums=(0, 1))(first, second)
        assert all(np.all(np.isfinite(slope)) for slope in slopes), slopes
    slopes = jax.grad(lambda *x: slerp(*x, 0.25).sum(), argnums=(0, 1))(a[:1], b[:1])
    np.testing.assert_allclose(slopes[0], 0.75 * np.ones((1, 3)), rtol=1e-6)
    np.testing.assert_allclose(slopes[1], 0.25 * np.ones((1, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(eta=0.5), EulerAncestral(), DPMSolverMultistep(algorithm="sde-dpmsolver++"), DDPM()],
    ids=lambda s: type(s).__name__,
)
def test_samplers_that_draw_noise_are_refused(sampler):
    """Also inside of a compiled function, as long as the sampler and the grid are values."""
    grid, x = trailing(Linear(), 5, max_steps=7), jnp.zeros((1, 2))
    with pytest.raises(ValueError, match=f"{type(sampler).__name__}.*draws noise"):
        jax.jit(lambda x: encode(sampler, MIXTURE.denoise, grid, x))(x)


def test_samplers_with_levels_for_one_direction_are_refused():
    grid, x = trailing(Linear(), 5, max_steps=7), jnp.zeros((1, 2))
    for sampler in (HeunChurn(1.0), TCD()):
        fitted = fit_grid(sampler, grid, Linear())
        with pytest.raises(ValueError, match=f"{type(sampler).__name__} .* lead down only"):
            encode(sampler, MIXTURE.denoise, fitted, x)


def test_data_in_float32_is_encoded_on_grids_in_float64(x64):
    x = jnp.zeros((2, 2), jnp.float32)
    grid = trailing(Linear(), 5, max_steps=7)
    assert grid.levels.t.dtype == jnp.float64
    assert encode(Heun(), MIXTURE.denoise, grid, x).dtype == jnp.float32


def test_what_does_not_fit_is_refused():
    grid = trailing(Linear(), 5, max_steps=7)
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="ends of its own"):
        encode(DDIM(), MIXTURE.denoise, grid._replace(ends=grid.levels), x)
    pairs = NoiseLevel(*(jnp.stack([f[1:], f[1:]], axis=1) for f in grid.levels))
    with pytest.raises(ValueError, match="two levels inside of each step"):
        encode(PNDM(), MIXTURE.denoise, grid._replace(middle=pairs), x)
    with pytest.raises(ValueError, match="KDPM2 evaluates .* fit_grid"):
        encode(KDPM2(), MIXTURE.denoise, grid, x)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2\) and \(2, 2\)"):
        slerp(x, jnp.zeros((2, 2)), 0.5)
    with pytest.raises(ValueError, match="got 0 with 'default'"):
        DDIMInversion(0)
    with pytest.raises(ValueError, match="got 2 with 'reference'"):
        DDIMInversion(2, variant="reference")
    with pytest.raises(ValueError, match="'default', 'reference'"):
        DDIMInversion(variant="paper")
