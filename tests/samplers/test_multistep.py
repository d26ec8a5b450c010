"""LMS, DEIS, PNDM and IPNDM: what they integrate exactly, their order, calls and special steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.schedules import EDM
from diffusion_jax.core.timesteps import karras
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.samplers import DEIS, IPNDM, LMS, PNDM, StepInfo, fit_grid, sample
from diffusion_jax.samplers.exponential import moments
from diffusion_jax.samplers.pndm import transfer
from tests import analytic
from tests.analytic import MIXTURE
from tests.samplers.test_convergence import SIGMA_MAX, SIGMA_MIN, reference, rms, solve

RUNGE_KUTTA = "runge_kutta"
GAUSSIAN = analytic.gaussian(0.4, 0.7)
EVEN = np.linspace(6.0, 0.0, 13)
LENGTH = 17


@jax.jit
def moments_in_log_ratio(h):
    """h ∫_0^1 e^{hτ} τ^k dτ for k = 1, 2, 3: what DEIS takes, from σ/α = 1 over h = log(σ/α)."""
    end = NoiseLevel(jnp.zeros_like(h), jnp.ones_like(h), jnp.exp(h))
    return moments("dpmsolver", -h, end, 3)[1:]


UNEVEN = np.asarray([6.0, 4.9, 3.2, 2.9, 1.7, 1.3, 0.4, 0.1])


def grid_of(ratios, *, alphas=None, sampler=None):
    """Levels with these σ/α, t = σ, padded; with what the sampler needs inside of its steps."""
    ratios = np.asarray(ratios, np.float64)
    alphas = np.ones_like(ratios) if alphas is None else np.asarray(alphas)
    fields = (np.pad(f, (0, LENGTH - len(ratios)), "edge") for f in (ratios, alphas * ratios))
    ratio, sigma = (jnp.asarray(field) for field in fields)
    alpha = jnp.asarray(np.pad(alphas, (0, LENGTH - len(ratios)), "edge"))
    grid = Grid(NoiseLevel(ratio, alpha, sigma), jnp.int32(0), jnp.int32(len(ratios) - 1))
    return grid if sampler is None else fit_grid(sampler, grid, EDM(1e-3, 10.0))


@functools.partial(jax.jit, static_argnames=("sampler", "denoise"))
def _states(sampler, denoise, grid, x):
    keys = image_keys(0, jnp.arange(x.shape[0]))
    return sample(sampler, denoise, grid, x, keys, trace=lambda state: state.x)[1]


def states(sampler, denoise, grid, x):
    """x_T and the sample after every step, [N + 1, B, ...]."""
    return np.concatenate([x[None], _states(sampler, denoise, grid, x)[: int(grid.stop)]])


COEFFICIENTS = np.asarray([0.7, -0.4, 0.3, 0.2, -0.1])


def _noise_of(basis, x, level):
    """ε̂ of image d is Σ_{k <= d} c_k basis^k: the exact flow is an integral."""
    eps = sum(jnp.where(jnp.arange(5) >= k, c * basis**k, 0.0) for k, c in enumerate(COEFFICIENTS))
    return Prediction((x - level.sigma * eps[:, None]) / level.alpha)


def of_ratio(x, level):
    return _noise_of(level.sigma / level.alpha, x, level)


def of_log_ratio(x, level):
    return _noise_of(jnp.log(level.sigma / level.alpha), x, level)


def integrals(denoise, ratios):
    """The antiderivatives in r of the polynomials in r or in log r, [N + 1, 5]."""
    r, parts = np.asarray(ratios), []
    for k in range(5):
        if denoise is of_ratio:
            parts.append(r ** (k + 1) / (k + 1))
        else:
            parts.append(r * np.log(r) ** k - (k * parts[-1] if k else 0.0))
    return np.cumsum(COEFFICIENTS * np.stack(parts, axis=-1), axis=-1)


def errors_of_steps(sampler, denoise, ratios):
    """Error of each step's change of x/α against the integral, [N, degree 0 … 4]."""
    grid = grid_of(ratios, sampler=sampler)
    xs = states(sampler, denoise, grid, jnp.full((5, 1), 0.3))[..., 0]
    return np.abs(np.diff(xs, axis=0) - np.diff(integrals(denoise, ratios), axis=0))


@pytest.mark.parametrize(
    "order, start",
    [(1, "euler"), (2, "euler"), (3, "euler"), (4, "euler"), (4, RUNGE_KUTTA)],
)
def test_lms_integrates_polynomials_of_its_degree(order, start, x64):
    """Steps of any length, the last to sigma = 0, once there is a full history."""
    errors = errors_of_steps(LMS(order, start), of_ratio, np.append(UNEVEN, 0.0))[order - 1 :]
    assert errors[:, :order].max() < 1e-11 < 1e-5 < errors[:, order:].min()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_integrates_polynomials_in_log_ratio(order, x64):
    errors = errors_of_steps(DEIS(order, lower_order_below=0), of_log_ratio, UNEVEN)[order - 1 :]
    assert errors[:, :order].max() < 1e-11 < 1e-5 < errors[:, order:].min()


def test_deis_lowers_its_order_at_the_end_of_short_grids(x64):
    """Below 15 steps the last step is of order 1 and the one before of order 2."""
    short = errors_of_steps(DEIS(3), of_log_ratio, np.geomspace(8.0, 0.1, 15))
    assert short[1:-1, 1].max() < 1e-11 < 1e-5 < short[-1, 1]
    assert short[2:-2, 2].max() < 1e-11 < 1e-5 < short[-2:, 2].min()
    long = errors_of_steps(DEIS(3), of_log_ratio, np.geomspace(8.0, 0.1, 16))
    assert long[2:, 2].max() < 1e-11
    never = DEIS(3, lower_order_below=0)
    assert errors_of_steps(never, of_log_ratio, np.geomspace(8.0, 0.1, 15))[2:, 2].max() < 1e-11


@pytest.mark.parametrize("h", [-30.0, -3.0, -1.0, -0.99, -1e-2, -1e-6, 0.0, 0.5, 2.0])
def test_moments_in_log_ratio(h, x64):
    """Against Gauss-Legendre quadrature; float32 keeps its digits for small steps."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    tau = (nodes + 1) / 2
    exact = [h * np.sum(weights / 2 * np.exp(h * tau) * tau**k) for k in (1, 2, 3)]
    np.testing.assert_allclose(moments_in_log_ratio(jnp.float64(h)), exact, rtol=1e-13)
    np.testing.assert_allclose(moments_in_log_ratio(jnp.float32(h)), exact, rtol=3e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_is_lms_on_equal_steps(order, x64):
    """The classical Adams-Bashforth weights, from the first step on."""
    x = jnp.asarray([[0.3], [-2.0]])
    grid = grid_of(EVEN)
    denoise = GAUSSIAN.denoise
    expected = states(LMS(order), denoise, grid, x)
    np.testing.assert_allclose(states(IPNDM(order), denoise, grid, x), expected, atol=1e-13)


def test_pndm_on_equal_steps_is_exact_from_its_start_on(x64):
    """Simpson's rule and order 4 for cubics; the trapezoidal rule and orders 2, 3, 4 for lines."""
    simpson = errors_of_steps(PNDM(), of_ratio, EVEN[:-1])
    assert simpson[:, :4].max() < 1e-11 < 1e-5 < simpson[:, 4].min()
    plms = errors_of_steps(PNDM(False), of_ratio, EVEN[:-1])
    assert plms[:, :2].max() < 1e-11 < 1e-5 < plms[:2, 2].min()
    assert plms[2:, 2].max() < 1e-11 < 1e-5 < plms[2, 3] and plms[3:, 3].max() < 1e-11


WEIGHTS = {1: (1,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12)}
WEIGHTS[4] = tuple(w / 24 for w in (55, -59, 37, -9))


@pytest.mark.parametrize("quantity", ["eps", "v"])
def test_plms_by_a_recursion_in_numpy(quantity, x64):
    """Improved Euler, then Adams-Bashforth of ε̂ or of v̂, on a variance-preserving path."""
    angles = np.linspace(1.4, 0.1, 8)
    grid = grid_of(np.tan(angles), alphas=np.cos(angles))
    alphas, sigmas = (np.asarray(field) for field in grid.levels[1:])
    x = np.asarray([[0.3, -2.0], [1.0, 0.2]])

    def output(x, i):
        level = NoiseLevel(0.0, np.full(2, alphas[i]), np.full(2, sigmas[i]))
        x0 = MIXTURE.x0(x, level)
        eps = (x - alphas[i] * x0) / sigmas[i]
        return eps if quantity == "eps" else alphas[i] * eps - sigmas[i] * x0

    def move(x, out, i):
        eps = out if quantity == "eps" else sigmas[i] * x + alphas[i] * out
        x0 = (x - sigmas[i] * eps) / alphas[i]
        return alphas[i + 1] * x0 + sigmas[i + 1] * eps

    expected, outputs = [x], []
    for i in range(7):
        outputs.insert(0, output(expected[-1], i))
        out = sum(w * o for w, o in zip(WEIGHTS[min(i + 1, 4)], outputs, strict=False))
        if i == 0:
            out = (outputs[0] + output(move(x, outputs[0], 0), 1)) / 2
        expected.append(move(expected[-1], out, i))
    sampler = PNDM(False, quantity)
    np.testing.assert_allclose(
        states(sampler, MIXTURE.denoise, grid, jnp.asarray(x)), expected, rtol=0, atol=1e-12
    )


@pytest.mark.slow
def test_pndm_takes_rounded_levels_from_the_grid(x64):
    """Two levels inside of the first steps: at the natural places they change nothing."""
    x = jnp.asarray([[0.3], [-2.0]])
    denoise = GAUSSIAN.denoise
    for sampler in (PNDM(True), PNDM(False)):
        grid = grid_of(EVEN[:-1], sampler=sampler)
        start, end = (NoiseLevel(*(f[i : LENGTH - 1 + i] for f in grid.levels)) for i in (0, 1))
        first, second = (grid.middle,) * 2 if sampler.runge_kutta_start else (end, start)
        plain = states(sampler, denoise, grid, x)
        pairs = [jnp.stack(pair, 1) for pair in zip(first, second, strict=True)]
        same = states(sampler, denoise, grid._replace(middle=NoiseLevel(*pairs)), x)
        np.testing.assert_allclose(same, plain, rtol=0, atol=1e-13)
        moved = NoiseLevel(pairs[0], pairs[1], pairs[2] * jnp.asarray([[1.0, 1.01]]))
        moved = states(sampler, denoise, grid._replace(middle=moved), x)
        assert np.abs(moved - plain)[1].min() > 1e-6


def test_what_the_start_of_pndm_shows_between_its_calls(x64):
    """The last stage is the step; the first is the Euler step to where the next call is."""
    x = jnp.asarray([[0.3], [-2.0]])
    denoise = GAUSSIAN.denoise
    for sampler, count in ((PNDM(True), 4), (PNDM(False), 2)):
        grid = grid_of(EVEN, sampler=sampler)
        level, end = grid.level(0), grid.next_level(0)
        info = StepInfo(0, 0, 12, grid.middle_level(0))
        eps = (x - denoise(x, level).x0) / level.sigma
        stages = sampler.starting_stages(denoise, x, eps, level, end, info)
        landing = info.middle if sampler.runge_kutta_start else end
        assert len(stages) == count
        np.testing.assert_allclose(stages[0], transfer(x, eps, level, landing), atol=1e-14)
        np.testing.assert_allclose(stages[-1], states(sampler, denoise, grid, x)[1], atol=1e-14)


@pytest.mark.parametrize(
    "sampler, extra",
    [
        (LMS(3, RUNGE_KUTTA), 6),
        (PNDM(), 9),
        (PNDM(False), 1),
    ],
)
def test_calls_of_the_network(sampler, extra):
    """N calls, and what the start adds."""
    calls = []

    def denoise(x, level):
        calls.append(level.t)
        return Prediction(0.5 * x)

    grid = grid_of(EVEN[:6], sampler=sampler)
    with jax.disable_jit():
        sample(sampler, denoise, grid, jnp.ones((1, 1)), image_keys(0, range(1)))
    assert len(calls) == 5 + extra


# (solver, window of the order between N = 64, 128 and 256, bound on the error at N = 32).
SOLVERS = {
    "lms_1": (LMS(1), (0.95, 1.05), 4.5e-2),
    "lms_2": (LMS(2), (1.9, 2.05), 8e-3),
    "lms_3": (LMS(3), (2.8, 3.05), 3e-3),
    "lms_4_runge_kutta": (LMS(4, RUNGE_KUTTA), (3.7, 4.05), 1.5e-3),
    "deis_2": (DEIS(2), (1.9, 2.1), 4e-3),
    "deis_3": (DEIS(3), (2.85, 3.1), 1e-3),
    "deis_4_runge_kutta": (DEIS(4, RUNGE_KUTTA), (3.8, 4.2), 3e-4),
    # One step of Euler limits whatever follows, once the rest is accurate enough.
    "deis_4": (DEIS(4), (1.9, 2.8), 3e-4),
}


def karras_without_last_step(sampler, num_steps):
    schedule = EDM(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
    grid = karras(schedule, num_steps + 1, max_steps=512)
    return fit_grid(sampler, grid, schedule)._replace(stop=jnp.asarray(num_steps, jnp.int32))


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


FAST = ("lms_2", "lms_4_runge_kutta", "deis_3", "deis_4")


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in SOLVERS])
def test_order_of_convergence(name, x64):
    sampler, (low, high), bound = SOLVERS[name]
    x, exact = reference()
    error = {}
    for num_steps in (32, 64, 128, 256):
        grid = karras_without_last_step(sampler, num_steps)
        error[num_steps] = rms(solve(sampler, grid, x), exact)
    assert error[32] < bound
    slopes = [np.log2(error[n] / error[2 * n]) for n in (64, 128)]
    assert all(low < slope < high for slope in slopes), slopes


def uniform_time(num_steps, max_steps=513):
    """Uniform times in [0.05, 1] of the continuous variance-preserving path of β = 0.1 … 20."""
    t = np.linspace(1.0, 0.05, num_steps + 1)
    t = np.append(t, np.full(max_steps - num_steps, t[-1]))
    alpha = np.exp(-0.25 * 19.9 * t**2 - 0.05 * t)
    levels = NoiseLevel(*(jnp.asarray(f) for f in (t, alpha, np.sqrt(1 - alpha**2))))
    return Grid(levels, jnp.int32(0), jnp.int32(num_steps))


@functools.cache
def reference_in_time():
    ratios = [
        float(uniform_time(1).levels.sigma[i] / uniform_time(1).levels.alpha[i]) for i in (0, 1)
    ]
    rng = np.random.default_rng(0)
    u = MIXTURE.draw(rng, 128) + ratios[0] * rng.standard_normal((128, 2))
    return u, analytic.ode_solution(MIXTURE, u, *ratios, steps=2048)


@pytest.mark.parametrize("sampler", [PNDM(False), slow(IPNDM(4))], ids=["plms", "ipndm"])
def test_plms_is_of_second_order_in_time(sampler, x64):
    """The weights of equal steps in time, but the transfer is no step in time: order 2."""
    u, exact = reference_in_time()
    error = {}
    for num_steps in (32, 256, 512):
        grid = uniform_time(num_steps)
        alpha = float(grid.levels.alpha[0]), float(grid.levels.alpha[num_steps])
        error[num_steps] = rms(solve(sampler, grid, alpha[0] * u) / alpha[1], exact)
    assert error[32] < 7e-3
    assert 1.9 < np.log2(error[256] / error[512]) < 2.3, error


@pytest.mark.parametrize("sampler", [LMS(4, RUNGE_KUTTA), DEIS(3), slow(PNDM()), slow(IPNDM(4))])
def test_path_does_not_matter(sampler, x64):
    x, _ = reference()
    grid = karras_without_last_step(sampler, 32)
    vp = analytic.in_vp(grid)
    if grid.middle is not None:
        norm = jnp.sqrt(grid.middle.alpha**2 + grid.middle.sigma**2)
        middle = NoiseLevel(grid.middle.t, grid.middle.alpha / norm, grid.middle.sigma / norm)
        vp = vp._replace(middle=middle)
    exploding = np.asarray(solve(sampler, grid, x))
    preserving = solve(sampler, vp, x * float(vp.levels.alpha[0]))
    np.testing.assert_allclose(preserving / vp.levels.alpha[32], exploding, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sampler", [LMS(4), DEIS(4)], ids=str)
def test_many_short_steps_in_float32(sampler):
    """200 steps from σ = 80 to 0.002: rounding stays at the level of the state's own."""
    data, schedule = analytic.gaussian(0.3, 0.5), EDM(0.002, 80.0)
    grid = karras(schedule, 200, max_steps=200)
    x = jnp.linspace(-100.0, 100.0, 4, dtype=jnp.float32)[:, None]
    out = _states(sampler, data.denoise, grid, x)[-1]
    start, end = NoiseLevel(0.0, 1.0, 80.0), NoiseLevel(0.0, 1.0, 0.0)
    exact = analytic.gaussian_flow(x, start, end, mean=0.3, std=0.5)
    np.testing.assert_allclose(out, exact, atol=1e-3)


@pytest.mark.parametrize("make", [LMS, DEIS])
def test_zero_signal_leaves_no_history(make, x64):
    """From alpha = 0 a step of Euler, and the next step begins anew."""
    ratios, alphas = np.asarray([1.0, 3.0, 2.0, 1.0]), np.asarray([0.0, 0.4, 0.5, 0.7])
    grid = grid_of(ratios, alphas=alphas)
    sigma = jnp.asarray([1.0, *grid.levels.sigma[1:]])
    grid = grid._replace(levels=grid.levels._replace(sigma=sigma))
    data, x = GAUSSIAN, jnp.asarray([[0.3], [-2.0]])
    whole = states(make(2), data.denoise, grid, x)
    np.testing.assert_allclose(whole[1], alphas[1] * 0.4 + sigma[1] * x, atol=1e-14)
    tail = grid_of(ratios[1:], alphas=alphas[1:])
    tail = states(make(2), data.denoise, tail, jnp.asarray(whole[1]))
    np.testing.assert_allclose(whole[1:], tail, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sampler", [LMS(2), DEIS(2), IPNDM()], ids=str)
def test_a_step_of_no_length_changes_nothing(sampler):
    ratios = np.asarray([6.0, 4.0, 2.0, 1.0, 0.5, 0.5])
    x = jnp.asarray([[0.3], [-2.0]])
    xs = states(sampler, GAUSSIAN.denoise, grid_of(ratios), x)
    assert np.all(np.isfinite(xs))
    np.testing.assert_allclose(xs[-1], xs[-2], atol=1e-6)


def test_ipndm_as_published_loses_x0_where_there_is_no_signal(x64):
    x, next_level = jnp.asarray([[2.0]]), NoiseLevel(0.5, 0.6, 0.8)
    level, info = NoiseLevel(1.0, jnp.asarray(0.0), 1.0), StepInfo(0, 0, 2)
    for variant, x0 in (("default", 0.3), ("reference", 0.0)):
        sampler = IPNDM(variant=variant)
        state = sampler.init(x)
        state = sampler.step(
            None, lambda x, _: Prediction(0.3 + 0 * x), state, level, next_level, info
        )
        np.testing.assert_allclose(state.x, [[0.6 * x0 + 0.8 * 2.0]], atol=1e-14)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LMS(5), "order must be one of .*got 5"),
        (lambda: LMS(2.0), "order must be one of .*got 2.0"),
        (lambda: LMS(True), "order must be one of .*got True"),
        (lambda: LMS(start="heun"), "'euler', 'runge_kutta'.*'heun'"),
        (lambda: DEIS(0), "order must be one of .*got 0"),
        (lambda: DEIS(True), "order must be one of .*got True"),
        (lambda: DEIS(lower_order_below=2.5), "at least 0, got 2.5"),
        (lambda: DEIS(lower_order_below=-1), "at least 0, got -1"),
        (lambda: PNDM(extrapolates="x0"), "'eps', 'v'.*'x0'"),
        (lambda: IPNDM(0), "order must be one of .*got 0"),
        (lambda: IPNDM(True), "order must be one of .*got True"),
        (lambda: IPNDM(variant="exact"), "'default', 'reference'.*'exact'"),
    ],
)
def test_options_that_do_not_exist_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("sampler", [LMS(start=RUNGE_KUTTA), PNDM()], ids=str)
def test_a_grid_without_middle_is_refused(sampler):
    with pytest.raises(ValueError, match="fit_grid"):
        states(sampler, MIXTURE.denoise, grid_of(EVEN), jnp.ones((1, 2)))
