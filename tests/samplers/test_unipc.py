"""UniPC: orders, its equality with DPM-Solver++, the corrector and both ends of a path."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.schedules import EDM
from diffusion_jax.core.timesteps import karras
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.samplers import DDIM, DPMSolverMultistep, StepInfo, UniPC, sample
from tests import analytic
from tests.samplers.test_convergence import reference, rms, solve, without_last_step

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "sampler, window, bound",
    [
        # Between 64, 128 and 256 steps, and the error at 32. Lower orders at the end, which the
        # paper has on every grid, limit the order to 2 where the grid ends above sigma = 0.
        pytest.param(UniPC(1), (1.9, 2.1), 7e-3, marks=slow),
        (UniPC(2, lower_order_final=False), (2.8, 3.1), 8e-4),
        pytest.param(UniPC(2, "bh1", lower_order_final=False), (2.8, 3.1), 9e-4, marks=slow),
        pytest.param(UniPC(2, "bh1", "eps", lower_order_final=False), (2.8, 3.1), 2e-3, marks=slow),
        (UniPC(3, lower_order_final=False), (3.2, 4.1), 2e-4),
        pytest.param(UniPC(3, "bh1", "eps", lower_order_final=False), (3.2, 4.3), 5e-4, marks=slow),
        pytest.param(UniPC(3), (1.9, 2.15), 1e-3, marks=slow),
    ],
)
def test_order_of_convergence(sampler, window, bound, x64):
    x, exact = reference()
    error = {n: rms(solve(sampler, without_last_step(n), x), exact) for n in (32, 64, 128, 256)}
    assert error[32] < bound, error
    slopes = [np.log2(error[n] / error[2 * n]) for n in (64, 128)]
    assert all(window[0] < slope < window[1] for slope in slopes), slopes


def predictor(order, solver_type="bh2", predict="x0"):
    return UniPC(order, solver_type, predict, corrector=False, lower_order_final=False)


@pytest.mark.parametrize("predict, algorithm", [("x0", "dpmsolver++"), ("eps", "dpmsolver")])
def test_second_predictor_is_2m(predict, algorithm, x64):
    """UniP-2 with B = e^z - 1 is DPM-Solver(++) 2M; UniP-1 is DDIM."""
    x, _ = reference()
    grid = without_last_step(33)
    multistep = DPMSolverMultistep(2, algorithm)
    ours, theirs = solve(predictor(2, "bh2", predict), grid, x), solve(multistep, grid, x)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    first = solve(predictor(1, "bh1", predict), grid, x), solve(DDIM(), grid, x)
    np.testing.assert_allclose(*first, rtol=0, atol=1e-12)


def geometric(ratios, alpha=1.0):
    return [NoiseLevel(jnp.asarray(0.0), jnp.asarray(alpha), jnp.asarray(s)) for s in ratios]


def drive(sampler, levels, denoise, count=None):
    """The states after every step, step by step."""
    states, keys = [sampler.init(jnp.ones((2, 1)))], image_keys(0, range(2))
    for i in range(len(levels) - 1):
        info = StepInfo(i, 0, count or len(levels) - 1)
        state = sampler.step(keys, denoise, states[-1], levels[i], levels[i + 1], info)
        states.append(state)
    return states


def polynomial(degree):
    """x̂0 = λ^degree, whatever x is."""
    return lambda x, level: Prediction(jnp.full(x.shape, (-jnp.log(level.sigma)) ** degree))


@pytest.mark.parametrize("order", [2, 3])
def test_corrector_integrates_polynomials_of_its_order_exactly(order, x64):
    """Where x̂0 is a polynomial of degree p in λ, UniC-p solves the last step exactly."""
    levels = geometric([8.0, 5.0, 2.5, 1.0, 0.6])
    sampler = UniPC(order, predict="x0", lower_order_final=False)
    before, after = drive(sampler, levels, polynomial(order))[-2:]
    start, end = (-float(jnp.log(level.sigma)) for level in levels[-2:])
    nodes, weights = np.polynomial.legendre.leggauss(30)
    lam = start + (end - start) * (nodes + 1) / 2
    integral = (end - start) / 2 * np.sum(weights * np.exp(lam - end) * lam**order)
    # A step of no length leaves x where the corrector put it.
    keys = image_keys(0, range(2))
    repeated = sampler.step(
        keys, polynomial(order), after, levels[-1], levels[-1], StepInfo(4, 0, 5)
    ).x
    corrected = sampler.step(
        keys, polynomial(order), before, levels[-2], levels[-2], StepInfo(3, 0, 5)
    ).x
    exact = np.exp(start - end) * np.asarray(corrected) + integral
    np.testing.assert_allclose(repeated, exact, rtol=0, atol=1e-10)
    assert np.abs(after.x - exact).max() > 1e-4


def test_corrector_can_be_left_out_of_single_steps(x64):
    levels = geometric(np.geomspace(8.0, 0.5, 6))
    denoise = analytic.gaussian(0.4, 0.3).denoise
    runs = {
        name: [np.asarray(state.x) for state in drive(sampler, levels, denoise)]
        for name, sampler in {
            "all": UniPC(3),
            "none": UniPC(3, corrector=False),
            "not_1": UniPC(3, disable_corrector=(1,)),
            "not_any": UniPC(3, disable_corrector=(0, 1, 2, 3, 4)),
            "not_last": UniPC(3, disable_corrector=(4,)),
        }.items()
    }
    # The result of step i is corrected in step i + 1, that of the last one never.
    assert all(np.array_equal(a, b) for a, b in zip(runs["none"], runs["not_any"], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(runs["all"], runs["not_last"], strict=True))
    same = [np.array_equal(a, b) for a, b in zip(runs["all"], runs["not_1"], strict=True)]
    assert same == [True, True, True, False, False, False]


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("predict", ["x0", "eps"])
def test_both_ends_are_finite_and_clean(solver_type, predict):
    """From alpha = 0 to sigma = 0, with a pause; bh1 is infinite there in released code."""
    alpha = jnp.asarray([0.0, 0.1, 0.4, 0.4, 0.8, 0.9, 1.0])
    levels = NoiseLevel(jnp.arange(7.0), alpha, jnp.sqrt(1.0 - alpha**2))
    grid = karras(EDM(), 6, max_steps=6)._replace(levels=levels)
    x0 = jnp.asarray([[0.3, -0.7], [0.1, 0.2]])
    sampler = UniPC(3, solver_type, predict, lower_order_final=False)
    keys = image_keys(0, range(2))
    out = sample(sampler, lambda x, level: Prediction(x0), grid, jnp.ones((2, 2)), keys)[0]
    np.testing.assert_allclose(out, x0, rtol=0, atol=2e-6)


def test_a_sample_changed_from_outside_stays_changed(x64):
    """The correction is added to x: what an inpainting sampler merged into x is not undone."""
    levels = geometric(np.geomspace(8.0, 0.5, 5))
    sampler, keys = UniPC(2), image_keys(0, range(2))
    state = drive(sampler, levels, polynomial(1))[2]
    here = levels[2], levels[3], StepInfo(2, 0, 4)
    moved = state.replace(x=state.x + 1.0)
    difference = (
        sampler.step(keys, polynomial(1), moved, *here).x
        - sampler.step(keys, polynomial(1), state, *here).x
    )
    np.testing.assert_allclose(difference, float(levels[3].sigma / levels[2].sigma), rtol=1e-12)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: UniPC(4), "order.*got 4"),
        (lambda: UniPC(solver_type="bh3"), "solver_type.*'bh3'"),
        (lambda: UniPC(predict="v"), "predict.*'v'"),
        (lambda: UniPC(disable_corrector=[1]), r"tuple.*\[1\]"),
        (lambda: UniPC(disable_corrector=(-1,)), r"at least 0.*\(-1,\)"),
        (lambda: UniPC(corrector=False, disable_corrector=(1,)), "give one"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
