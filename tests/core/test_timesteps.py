"""Sampling grids: published spacings, padding, RePaint's jumps, refusals."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.schedules import (
    EDM,
    Cosine,
    CosineLogSNR,
    FlowMatching,
    Laplace,
    Linear,
    ScaledLinear,
    ZeroTerminalSNR,
)
from diffusion_jax.core.timesteps import (
    Steps,
    check_num_steps,
    from_times,
    jumps,
    karras,
    latent_diffusion_times,
    leading,
    linspace,
    sections,
    space_timesteps,
    trailing,
)


def times(grid):
    return np.asarray(grid.levels.t)[: int(grid.stop)]


def test_spacings_of_ten_steps():
    """Lin et al. 2023, table 2: T = 1000, N = 10 (their times count from 1)."""
    theirs = {
        "leading": [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
        "linspace": [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1],
        "trailing": [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100],
    }
    ours = {
        "leading": leading(Linear(), 10, max_steps=10),
        "linspace": linspace(Linear(), 10, max_steps=10, round_t=True),
        "trailing": trailing(Linear(), 10, max_steps=10),
    }
    for name, expected in theirs.items():
        np.testing.assert_array_equal(times(ours[name]) + 1, expected, name)


def test_offset_and_uneven_division():
    """Stable Diffusion's leading times with steps_offset 1, and rounding where N divides no T."""
    grid = leading(ScaledLinear(), 50, max_steps=50, offset=1)
    np.testing.assert_array_equal(times(grid), np.arange(981, 0, -20))
    np.testing.assert_array_equal(times(leading(Linear(), 3, max_steps=3)), [666, 333, 0])
    exact = times(trailing(Linear(), 3, max_steps=3))
    np.testing.assert_allclose(exact, [999, 999 - 1000 / 3, 999 - 2000 / 3], rtol=1e-6)
    rounded = times(trailing(Linear(), 3, max_steps=3, round_t=True))
    np.testing.assert_array_equal(rounded, [999, 666, 332])


def test_latent_diffusions_times():
    """1 + every ⌊T / N⌋-th time, or 1 + ⌊0.8 T (k / (N - 1))²⌋; as grids, each time once."""
    assert latent_diffusion_times(1000, 10) == tuple(range(1, 1000, 100))
    # ⌊1000 / 30⌋ = 33 fits 31 times below 1000.
    assert latent_diffusion_times(1000, 30) == tuple(range(1, 1000, 33))
    assert len(latent_diffusion_times(1000, 30)) == 31
    quad = tuple(1 + 800 * k * k // 81 for k in range(10))
    assert latent_diffusion_times(1000, 10, "quad") == quad and quad[-1] == 801
    assert latent_diffusion_times(1000, 50, "quad")[:4] == (1, 1, 2, 3)
    for spec, first in (("uniform30", 991), ("quad50", 801)):
        grid = sections(Linear(), spec, max_steps=60, final="t_min")
        assert times(grid)[0] == first and times(grid)[-1] == 1
    assert int(sections(Linear(), "uniform30", max_steps=31).stop) == 31
    assert int(sections(Linear(), "quad50", max_steps=50).stop) == 49
    assert int(Steps("sections", sections="uniform20").grid(Linear()).stop) == 20
    with pytest.raises(ValueError, match="spacing must be 'uniform' or 'quad', got 'linear'"):
        latent_diffusion_times(1000, 10, "linear")
    with pytest.raises(ValueError, match="num_steps = 1001 exceeds"):
        latent_diffusion_times(1000, 1001)
    with pytest.raises(ValueError, match=r"times must lie in \[0.0, 999.0\], got 1000"):
        sections(Linear(), "uniform3")
    with pytest.raises(ValueError, match="sections must be numbers.*'uniform50'.*got 'quad5,5'"):
        space_timesteps(1000, "quad5,5")


def test_continuous_time():
    schedule = CosineLogSNR()
    np.testing.assert_allclose(times(trailing(schedule, 4, max_steps=4)), [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(times(leading(schedule, 4, max_steps=4)), [0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(times(linspace(schedule, 5, max_steps=5)), [1, 0.75, 0.5, 0.25, 0])


def test_single_steps_start_at_the_noisy_end():
    for make in (trailing, linspace, karras):
        np.testing.assert_array_equal(times(make(Linear(), 1, max_steps=1)), [999])


def test_rates_are_the_schedules_and_the_rest_is_padding():
    schedule = Cosine()
    grid = trailing(schedule, 4, max_steps=7)
    expected = schedule(np.asarray([999.0, 749.0, 499.0, 249.0]))
    for name in ("alpha", "sigma"):
        values = np.asarray(getattr(grid.levels, name))
        assert values.shape == (8,) and values.dtype == np.float32
        np.testing.assert_allclose(values[:4], getattr(expected, name), rtol=1e-6)
    np.testing.assert_array_equal(grid.levels.alpha[4:], 1.0)
    np.testing.assert_array_equal(grid.levels.sigma[4:], 0.0)
    assert (int(grid.start), int(grid.stop)) == (0, 4)
    assert grid.start.dtype == grid.stop.dtype == jnp.int32


def test_final_level_of_stable_diffusion():
    grid = leading(ScaledLinear(), 5, max_steps=5, offset=1, final="t_min")
    np.testing.assert_allclose(grid.levels.alpha[5] ** 2, 0.99915, rtol=1e-6)
    np.testing.assert_allclose(grid.levels.sigma[5] ** 2, 0.00085, rtol=1e-4)


def test_karras_levels():
    """EDM's own grid: N = 18, the values of eq. 5 in numbers."""
    grid = karras(EDM(), 18, max_steps=18)
    sigmas = np.asarray(grid.levels.sigma)
    root = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 18) ** 7
    np.testing.assert_allclose(sigmas[:18], root, rtol=1e-5)
    assert sigmas[18] == 0.0
    roots = sigmas[:18].astype(np.float64) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-3)
    own = karras(EDM(), 5, max_steps=5, rho=1.0, sigma_min=1.0, sigma_max=5.0)
    np.testing.assert_allclose(own.levels.sigma[:5], [5, 4, 3, 2, 1], rtol=1e-6)


def test_karras_on_a_discrete_schedule_asks_the_network_for_the_right_times():
    schedule = ScaledLinear()
    exact, rounded = (karras(schedule, 12, max_steps=12, round_t=flag) for flag in (False, True))
    np.testing.assert_array_equal(rounded.levels.t, np.round(exact.levels.t))
    np.testing.assert_array_equal(rounded.levels.sigma, exact.levels.sigma)
    level = schedule(np.asarray(exact.levels.t[:12], np.float64))
    np.testing.assert_allclose(exact.levels.sigma[:12], level.sigma, rtol=1e-4)
    np.testing.assert_allclose(times(exact)[[0, -1]], [999, 0], atol=1e-6)


def test_starting_at_and_fixed():
    grid = trailing(Linear(), 4, max_steps=6)
    assert int(grid.starting_at(3).start) == 3 and int(grid.starting_at(0).start) == 0
    fixed = grid.starting_at(1).fixed()
    assert (fixed.start, fixed.stop) == (1, 4) and isinstance(fixed.start, int)
    for step in (-1, 4):
        with pytest.raises(ValueError, match=rf"\[0, 4\), got {step}"):
            grid.starting_at(step)
    level = grid.level(1)
    np.testing.assert_array_equal(level.t, 749.0)


def test_repaint_jumps_of_the_paper():
    """T = 250, j = 10, n = 10: 4570 transitions, of which 2410 denoise."""
    grid = linspace(Linear(250), 250, max_steps=250)
    path = jumps(grid, jump_length=10, num_resamples=10)
    sigma = np.asarray(path.levels.sigma)[: int(path.stop) + 1]
    assert int(path.stop) == 4570
    assert np.sum(np.diff(sigma) < 0) == 2410
    assert sigma[-1] == 0.0 and sigma[0] == np.asarray(grid.levels.sigma)[0]
    # Neighbours on the path are neighbours on the grid.
    position = {float(t): i for i, t in enumerate(times(grid))}
    visited = [position[float(t)] for t in np.asarray(path.levels.t)[: int(path.stop)]]
    assert set(np.abs(np.diff(visited))) == {1}
    assert len(set(visited)) == 250


def test_one_resample_is_the_grid_itself():
    grid = trailing(Linear(), 6, max_steps=6)
    same = jumps(grid, jump_length=2, num_resamples=1)
    for before, after in zip(grid.levels, same.levels, strict=True):
        np.testing.assert_array_equal(before, after)


def test_small_jumps_by_hand():
    """N = 4 levels 3 2 1 0, j = 2, n = 2: down to 0 twice before the last stretch ends."""
    grid = linspace(Linear(4, 0.1, 0.5), 4, max_steps=4)
    path = jumps(grid, jump_length=2, num_resamples=2, max_steps=10)
    np.testing.assert_array_equal(times(path), [3, 2, 1, 0, 1, 2, 1, 0])
    assert path.levels.t.shape == (11,)


@pytest.mark.parametrize("make", [trailing, leading, linspace, karras])
@pytest.mark.parametrize(
    "num_steps, message",
    [(0, "at least 1, got 0"), (-3, "at least 1, got -3"), (2.0, "integer, got 2.0"),
     (True, "integer, got True"), ("5", "integer, got '5'"), (9, "9 exceeds max_steps = 8")],
)  # fmt: skip
def test_number_of_steps_is_checked(make, num_steps, message):
    with pytest.raises(ValueError, match=message):
        make(Linear(), num_steps, max_steps=8)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: trailing(Linear(10), 11), "11 exceeds the schedule's 10 timesteps"),
        (lambda: leading(Linear(10), 10, offset=1), "must lie in"),
        (lambda: leading(Linear(10), 5, offset=-1), "must lie in"),
        (lambda: leading(CosineLogSNR(), 5, offset=1), "continuous"),
        (lambda: from_times(Linear(), [1.0, 2.0]), "strictly decreasing"),
        (lambda: from_times(Linear(), [5.0, 5.0]), "strictly decreasing"),
        (lambda: from_times(Linear(), [[5.0, 4.0]]), "strictly decreasing"),
        (lambda: from_times(Linear(), [np.nan]), r"finite sequence, got \[nan\]"),
        (lambda: from_times(Linear(), [5.0, -np.inf]), "finite sequence"),
        (lambda: from_times(Linear(), [1000.0, 5.0]), r"\[0.0, 999.0\], got 1000.0 to 5.0"),
        (lambda: from_times(Linear(), [5.0, -1.0]), "must lie in"),
        (lambda: from_times(Linear(), []), "at least 1, got 0"),
        (lambda: from_times(Linear(), [5.0], final="zero"), "'zero'"),
        (lambda: karras(Linear(), 5, rho=0.0), "rho must be positive, got 0.0"),
        (lambda: karras(EDM(), 5, sigma_min=3.0, sigma_max=2.0), "got 3.0 and 2.0"),
        (
            lambda: karras(ZeroTerminalSNR(1000, Linear()), 5),
            "zero terminal SNR, .* needs",
        ),
        (lambda: jumps(trailing(Linear(), 4), jump_length=0, num_resamples=2), "got 0, 2"),
        (lambda: jumps(trailing(Linear(), 4), jump_length=1, num_resamples=0), "got 1, 0"),
        (
            lambda: jumps(trailing(Linear(), 4).starting_at(1), jump_length=1, num_resamples=2),
            "starts at step 0, got 1",
        ),
        (
            lambda: jumps(trailing(Linear(), 4), jump_length=1, num_resamples=5, max_steps=6),
            "exceeds max_steps = 6",
        ),
        (lambda: karras(FlowMatching(), 5), "flow matching\\) needs sigma_max"),
        (lambda: trailing(Laplace(), 5, round_t=True), "Laplace is continuous"),
        (lambda: linspace(EDM(), 5, round_t=True), "EDM is continuous"),
        (lambda: karras(EDM(), 5, round_t=True), "EDM is continuous"),
        (lambda: sections(CosineLogSNR(), "10"), "CosineLogSNR is continuous, use .*'trailing'"),
        (lambda: sections(Linear(), "10", max_steps=9), "10 exceeds max_steps = 9"),
        (lambda: space_timesteps(1000, "ddim60"), "'ddim60': no integer stride .* give a divisor"),
        (lambda: space_timesteps(1000, "ddim1001"), "'ddim1001': no integer stride"),
        (lambda: space_timesteps(1000, "1001"), "section 0 .* has 1000 .* cannot take 1001"),
        (lambda: space_timesteps(10, "3,6,1"), "section 1 .* has 3 of the 10 .* cannot take 6"),
        (lambda: space_timesteps(40, "fast27"), "section 0 .* has 8 .* cannot take 10"),
        (lambda: space_timesteps(1000, ""), "'10,10,3,2,2', 'ddim50', 'uniform50', .*got ''"),
        (lambda: space_timesteps(1000, "10,,3"), "got '10,,3'"),
        (lambda: space_timesteps(1000, "10,-3"), "got '10,-3'"),
        (lambda: space_timesteps(1000, "0,0"), "got '0,0'"),
        (lambda: space_timesteps(1000, "2.5"), "got '2.5'"),
        (lambda: space_timesteps(1000, "ddim"), "got 'ddim'"),
        (lambda: space_timesteps(1000, "ddim10,10"), "got 'ddim10,10'"),
        (lambda: space_timesteps(1000, "fast28"), "got 'fast28'"),
        (lambda: Steps(spacing="middle"), "'middle'"),
        (lambda: Steps("sections"), "go together, got spacing = 'sections' and sections = None"),
        (lambda: Steps(sections="250"), "go together, got spacing = 'trailing'"),
        (lambda: Steps("sections", sections="x"), "'fast27', got 'x'"),
        (
            lambda: replace(Steps("sections", sections="25"), num_steps=20),
            "'25' make 25 steps, got num_steps = 20; leave num_steps out",
        ),
        (lambda: Steps("sections", sections="9,9", max_steps=17), "18 exceeds max_steps = 17"),
        (lambda: Steps("leading", round_t=True), "'leading' makes integers anyway"),
        (lambda: Steps("sections", sections="5", round_t=True), "'sections' makes integers"),
        (lambda: Steps(num_steps=5, round_t=True).grid(FlowMatching()), "FlowMatching is cont"),
        (lambda: Steps(num_steps=0), "at least 1"),
        (lambda: Steps(num_steps=51, max_steps=50), "51 exceeds"),
    ],
)
def test_bad_grids_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("ends", [{"sigma_max": 16.0}, {"sigma_min": 0.02}, {"sigma_max": 1e3}])
def test_karras_outside_of_the_schedule_is_refused(ends):
    """Noise that the schedule does not have cannot be asked of its network."""
    with pytest.raises(ValueError, match="from 0.029.* to 14.6"):
        karras(ScaledLinear(), 5, **ends)


# What guided_diffusion's respacing gives for these strings.
RESPACED = {
    (300, "10,15,20"): (
        [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
        + [100, 107, 114, 121, 128, 135, 142, 149, 157, 164, 171, 178, 185, 192, 199]
        + [200, 205, 210, 216, 221, 226, 231, 236, 242, 247]
        + [252, 257, 263, 268, 273, 278, 283, 289, 294, 299]
    ),
    (1000, "27"): (
        [0, 38, 77, 115, 154, 192, 231, 269, 307, 346, 384, 423, 461, 499]
        + [538, 576, 615, 653, 692, 730, 768, 807, 845, 884, 922, 961, 999]
    ),
    (1000, "ddim25"): list(range(0, 1000, 40)),
    (1000, "ddim50"): list(range(0, 1000, 20)),
    (100, "1"): [0],
    # By hand: the stride of "10" is 111; halves go to the even neighbour; 34 is the least stride
    # that visits 30 of 1000; a section may be left out; 4 + 3 times in the sections of 7.
    (1000, "10"): list(range(0, 1000, 111)),
    (1000, "3"): [0, 500, 999],
    (998, "3"): [0, 498, 997],
    (1000, "ddim30"): list(range(0, 1000, 34)),
    (10, "0,5"): [5, 6, 7, 8, 9],
    (7, "2,2"): [0, 3, 4, 6],
    # GLIDE's: sections of 200 times, and 997 in the place of 999.
    (1000, "fast27"): (
        [0, 22, 44, 66, 88, 111, 133, 155, 177, 199]
        + [200, 222, 244, 266, 288, 311, 333, 355, 377, 399]
        + [400, 500, 599, 600, 799, 800, 997]
    ),
}


@pytest.mark.parametrize("total, spec", RESPACED)
def test_respacing_strings(total, spec):
    times = space_timesteps(total, spec)
    assert list(times) == RESPACED[total, spec] and all(type(t) is int for t in times)


def test_respacing_of_the_released_models():
    """Where 250 of 1000 and 100 of 4000 leave the even stride, by rounding."""
    times = space_timesteps(1000, "250")
    assert (len(times), times[40:43], times[-2:]) == (250, (160, 164, 169), (995, 999))
    jumps_of_five = [t for t, after in zip(times, times[1:], strict=False) if after - t == 5]
    assert jumps_of_five == [164, 497, 830]
    times = space_timesteps(4000, "100")
    assert times[:6] == (0, 40, 81, 121, 162, 202) and times[-3:] == (3918, 3959, 3999)


def test_sections_visit_the_schedules_own_levels():
    schedule = Cosine()
    grid = sections(schedule, "10,5", max_steps=20)
    expected = np.asarray(space_timesteps(1000, "10,5")[::-1], np.float64)
    np.testing.assert_array_equal(times(grid), expected)
    np.testing.assert_allclose(grid.levels.alpha[:15], schedule(expected).alpha, rtol=1e-6)
    assert int(grid.stop) == 15 and grid.levels.t.shape == (21,)
    assert float(grid.levels.sigma[15]) == 0.0
    last = sections(schedule, "10,5", max_steps=15, final="t_min").levels.alpha[15]
    np.testing.assert_allclose(last, schedule(np.asarray(0.0)).alpha, rtol=1e-6)


def test_grids_of_flow_matching():
    """Three steps of SD3's kind: shifted noise rates, which are the times that it is told."""
    schedule = FlowMatching(3.0)
    grid = linspace(schedule, 3, max_steps=3)
    t = np.asarray([1.0, 0.5005, 0.001])
    expected = 3 * t / (1 + 2 * t)
    np.testing.assert_allclose(grid.levels.sigma, [*expected, 0.0], rtol=1e-6)
    np.testing.assert_allclose(grid.levels.alpha, [*(1 - expected), 1.0], atol=1e-7)
    np.testing.assert_allclose(grid.levels.t[:3], expected, rtol=1e-6)
    ratio = karras(schedule, 4, max_steps=4, sigma_max=50.0, rho=1.0, sigma_min=2.0).levels
    np.testing.assert_allclose(ratio.sigma[:4] / ratio.alpha[:4], [50, 34, 18, 2], rtol=1e-5)


def test_steps_of_sections_know_their_number():
    steps = Steps("sections", sections="10,10,3,2,2")
    assert steps.num_steps == 27 and Steps("sections", sections="fast27").num_steps == 27
    assert Steps("sections", sections="ddim50").num_steps == 50
    assert Steps("sections", num_steps=27, sections="10,10,3,2,2") == steps
    np.testing.assert_array_equal(
        times(steps.grid(Linear())), space_timesteps(1000, "10,10,3,2,2")[::-1]
    )
    other = replace(steps, num_steps=9, spacing="trailing", sections=None)
    assert other == Steps(num_steps=9) and Steps().num_steps == 50


def test_steps_round_where_they_are_told_to():
    exact = times(Steps(num_steps=3).grid(Linear()))
    rounded = times(Steps(num_steps=3, round_t=True).grid(Linear()))
    np.testing.assert_array_equal(rounded, [999, 666, 332])
    assert exact[1] != rounded[1]


def test_steps_builds_the_named_grid():
    grid = Steps("leading", 5, max_steps=9).grid(Linear())
    np.testing.assert_array_equal(times(grid), [800, 600, 400, 200, 0])
    assert grid.levels.t.shape == (10,)
    check_num_steps(np.int64(3), 3)
