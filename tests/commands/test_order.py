"""Exact moments by chosen noise, and the verdict of `bench order`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import cli
from diffusion_jax.commands import order as order_command
from diffusion_jax.commands.moments import affine_map, variance_error
from diffusion_jax.commands.order import GAUSSIAN, measure, show
from diffusion_jax.commands.order_table import ORDERS, LinearVP, sde_grid, uniform_in_time
from diffusion_jax.core.mixture import MIXTURE
from diffusion_jax.samplers import DDIM, DDPM, PNDM, Euler, Heun, SamplerState


def ratios(num_steps):
    """Karras et al.'s noise-to-signal ratios from 20 to 0.02."""
    ramp = np.linspace(0.0, 1.0, num_steps + 1)
    return (20.0 ** (1 / 7) + ramp * (0.02 ** (1 / 7) - 20.0 ** (1 / 7))) ** 7


def ancestral(num_steps, *, large):
    """Gain and noises of ancestral sampling in x / α, by a recursion of its own."""
    r, variance = ratios(num_steps), 0.25**2
    gain, noises = 1.0, np.zeros(0)
    for t, s in zip(r[:-1], r[1:], strict=True):
        keep = (s / t) ** 2
        a = keep + (1.0 - keep) * variance / (variance + t**2)
        b = (t**2 - s**2) * (1 + s**2) / (1 + t**2) if large else s**2 * (1.0 - keep)
        gain, noises = a * gain, np.append(a * noises, np.sqrt(b))
    return gain, noises


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_the_affine_map_of_a_trajectory_is_that_of_its_steps(large):
    sampler = DDPM("large" if large else "small")
    with jax.enable_x64(True):
        grid = sde_grid(sampler, 12)
    gain, offset, noises = affine_map(sampler, GAUSSIAN, grid)
    expected, expected_noises = ancestral(12, large=large)
    start, end = (float(grid.levels.alpha[i]) for i in (0, 12))
    # Back from x to x / α at both ends.
    assert gain * start / end == pytest.approx(expected, rel=1e-10)
    assert abs(offset) < 1e-14
    found = noises[np.abs(noises) > 1e-12] / end
    np.testing.assert_allclose(found, expected_noises, rtol=1e-10)


@pytest.mark.slow
def test_a_deterministic_sampler_has_no_noise_and_the_flow_no_error():
    with jax.enable_x64(True):
        grid = sde_grid(Heun(), 256)
    assert np.abs(affine_map(Heun(), GAUSSIAN, grid)[2]).max() < 1e-14
    assert abs(variance_error(Heun(), GAUSSIAN, grid)) < 1e-3
    with jax.enable_x64(True):
        a, b = (variance_error(DDIM(eta=eta), GAUSSIAN, grid) for eta in (0.0, 1.0))
    assert variance_error(Euler(), GAUSSIAN, grid) == pytest.approx(a, abs=1e-12)
    assert variance_error(DDPM("small"), GAUSSIAN, grid) == pytest.approx(b, abs=1e-12)


class Hidden(DDPM):
    """Draws noise where nobody looks for it."""

    def step(self, keys, denoise, state, level, next_level, info):
        state = Euler().step(keys, denoise, state, level, next_level, info)
        draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 99), (1,)))
        return SamplerState(state.x + 0.1 * draw(keys))


def test_noise_that_is_not_found_is_an_error():
    with jax.enable_x64(True):
        grid = sde_grid(Euler(), 4)
    with pytest.raises(ValueError, match="not found"):
        affine_map(Hidden(), GAUSSIAN, grid)
    with pytest.raises(ValueError, match="one Gaussian"):
        affine_map(Euler(), MIXTURE, grid)


def test_the_smooth_schedule_undoes_itself_and_preserves_variance():
    schedule = LinearVP()
    t = np.linspace(0.05, 1.0, 20)
    level = schedule(t)
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1.0, rtol=0, atol=1e-14)
    log_snr = 2.0 * np.log(level.alpha / level.sigma)
    np.testing.assert_allclose(schedule.inverse(log_snr), t, rtol=1e-12)
    assert np.all(np.diff(log_snr) < 0)


def test_the_middle_in_time_is_in_the_middle(x64):
    grid = uniform_in_time(PNDM(), 8)
    times = np.asarray(grid.levels.t)[:9]
    np.testing.assert_allclose(times, np.linspace(1.0, 0.05, 9), atol=1e-12)
    np.testing.assert_allclose(grid.middle.t[:8], (times[:-1] + times[1:]) / 2, atol=1e-12)


def test_a_slope_outside_of_its_window_is_seen(monkeypatch, capsys):
    """Euler's method passed off as one of second order, and a bound that it cannot meet."""
    euler = replace(ORDERS["euler"], num_steps=(32, 64))
    assert measure(euler).inside
    assert not measure(replace(euler, low=1.9, high=2.1)).inside
    assert not measure(replace(euler, error=(32, 1e-3))).inside
    table = {"euler": euler, "liar": replace(euler, low=1.9, high=2.1)}
    monkeypatch.setattr(order_command, "ORDERS", table)
    assert show(["euler"]) and not show()
    assert cli.main(["bench", "order"]) == 1
    assert cli.main(["bench", "order", "euler"]) == 0
    assert "OUTSIDE" in capsys.readouterr().out
    assert cli.main(["bench", "order", "heun"]) == 2
    assert "no rows ['heun']" in capsys.readouterr().err


def test_points_start_from_the_law_of_the_first_level():
    """x_T of the strong orders has the mixture's mean and spread at σ = 10."""
    x, exact = order_command._flow(1.0, 10.0, 1.0, 0.1)
    assert x.shape == exact.shape == (256, 2) and exact.dtype == np.float64
    assert abs(x.std() - 10.0) < 1.0 and np.abs(exact).max() < 4.0
    assert jnp.asarray(1.0).dtype == jnp.float32
