"""What a grid may hold beside its levels: a level inside of each step, and other ends."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.grid import schedule_time, with_middle
from diffusion_jax.core.schedules import EDM, Cosine, FlowMatching, Linear, ZeroTerminalSNR
from diffusion_jax.core.timesteps import from_times, jumps, karras, leading, trailing
from diffusion_jax.core.types import NoiseLevel


def test_the_middle_in_log_snr_is_the_geometric_mean_of_the_ratios():
    schedule = EDM()
    grid = with_middle(karras(schedule, 6, max_steps=8), schedule, "log_snr")
    sigma, middle = np.asarray(grid.levels.sigma), np.asarray(grid.middle.sigma)
    np.testing.assert_allclose(middle[:5], np.sqrt(sigma[:5] * sigma[1:6]), rtol=1e-5)
    np.testing.assert_array_equal(grid.middle.alpha[:5], 1.0)
    np.testing.assert_array_equal(grid.middle.t[:5], middle[:5])
    # The last step goes to sigma = 0, which has no middle; the rest is padding.
    np.testing.assert_array_equal(middle[5:], 0.0)


@pytest.mark.parametrize("schedule", [Linear(), FlowMatching(shift=3.0)], ids=["linear", "flow"])
def test_the_middle_lies_on_the_schedule(schedule):
    grid = with_middle(trailing(schedule, 8, max_steps=8), schedule, "log_snr")
    _, alpha, sigma = (np.asarray(field, np.float64) for field in grid.levels)
    ratio = sigma / np.where(alpha > 0, alpha, 1.0)
    middle = NoiseLevel(*(np.asarray(field, np.float64)[1:7] for field in grid.middle))
    np.testing.assert_allclose(
        middle.sigma / middle.alpha, np.sqrt(ratio[1:7] * ratio[2:8]), rtol=2e-4
    )
    norm = middle.alpha**2 + middle.sigma**2 if schedule.num_timesteps else middle[1] + middle[2]
    np.testing.assert_allclose(norm, 1.0, atol=1e-6)


def test_the_middle_in_time():
    grid = with_middle(leading(Linear(), 4, max_steps=4), Linear(), "time")
    np.testing.assert_array_equal(grid.middle.t, [625.0, 375.0, 125.0, 0.0])
    schedule = FlowMatching()
    grid = with_middle(trailing(schedule, 4, max_steps=4), schedule, "time")
    sigma = np.asarray(grid.levels.sigma[:4])
    np.testing.assert_allclose(grid.middle.sigma[:3], (sigma[:-1] + sigma[1:]) / 2, rtol=1e-6)


def test_the_middle_in_time_is_that_of_the_schedule_where_the_network_is_told_another(x64):
    schedule, times = FlowMatching(shift=3.0), np.asarray([1.0, 0.6, 0.3])
    middle = with_middle(from_times(schedule, times, max_steps=3), schedule, "time").middle
    t = (times + np.append(times[1:], schedule.t_min)) / 2
    np.testing.assert_allclose(middle.sigma, 3.0 * t / (1.0 + 2.0 * t), rtol=1e-12)


def test_the_time_of_a_level_is_found_by_its_rates(x64):
    """On rounded times the network is told whole numbers; where it is told t, that is exact."""
    schedule = Linear()
    grid = karras(schedule, 4, max_steps=4, round_t=True)
    exact = karras(schedule, 4, max_steps=4).levels.t
    np.testing.assert_allclose(schedule_time(schedule, grid.levels), exact, rtol=1e-9, atol=1e-9)
    assert np.abs(grid.levels.t - exact).max() > 0.05
    whole = NoiseLevel(*(jnp.asarray(f, jnp.float32) for f in schedule(np.arange(1000.0))))
    np.testing.assert_array_equal(schedule_time(schedule, whole), np.arange(1000.0))
    ends = NoiseLevel(*map(jnp.asarray, ([0.5, 0.5], [1.0, 0.0], [0.0, 1.0])))
    np.testing.assert_array_equal(schedule_time(FlowMatching(shift=3.0), ends), [1e-3, 1.0])


def test_a_step_from_zero_signal_has_no_middle():
    schedule = ZeroTerminalSNR(1000, Cosine())
    grid = with_middle(trailing(schedule, 4, max_steps=4), schedule, "log_snr")
    assert np.all(np.isfinite(jnp.stack(grid.middle)))
    assert [float(field[0]) for field in grid.middle] == [float(f[1]) for f in grid.levels]


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="'log_snr', 'time'.*'sigma'"):
        with_middle(trailing(Linear(), 4), Linear(), "sigma")


def test_steps_may_end_elsewhere_than_the_next_one_starts():
    schedule = Linear()
    grid = from_times(schedule, [900.0, 500.0, 100.0], max_steps=4)
    assert float(grid.next_level(0).t) == 500.0
    ends = schedule(jnp.asarray([501.0, 101.0, 0.0, 0.0]))
    other = grid._replace(ends=ends)
    assert [float(other.next_level(i).t) for i in range(3)] == [501.0, 101.0, 0.0]
    assert [float(other.level(i).t) for i in range(3)] == [900.0, 500.0, 100.0]
    middle = with_middle(other, schedule, "time").middle
    np.testing.assert_array_equal(middle.t[:3], [700.5, 300.5, 50.0])


@pytest.mark.parametrize("field, words", [("ends", "ends of its"), ("middle", "levels inside of")])
def test_jumps_of_a_grid_that_is_more_than_its_levels_are_refused(field, words):
    grid = trailing(Linear(), 4, max_steps=4)
    inside = NoiseLevel(*(f[1:] for f in grid.levels))
    with pytest.raises(ValueError, match=f"{words}.*jumps first and then fit_grid"):
        jumps(grid._replace(**{field: inside}), jump_length=1, num_resamples=2)


def test_all_levels_of_a_grid_change_their_type(x64):
    grid = with_middle(trailing(Linear(), 4, max_steps=4), Linear(), "time")
    grid = grid._replace(ends=grid.middle)
    narrow = grid.astype(jnp.float32)
    for wide, level in zip((grid.levels, grid.middle), (narrow.levels, narrow.ends), strict=True):
        assert [field.dtype for field in wide] == [np.float64] * 3
        assert [field.dtype for field in level] == [np.float32] * 3
    assert narrow.middle.t.dtype == np.float32
    assert narrow.stop.dtype == jnp.int32 and trailing(Linear(), 4).astype(np.float32).ends is None
