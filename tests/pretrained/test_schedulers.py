"""Scheduler configurations: what they say, what they refuse, and that they come back."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import make_denoiser
from diffusion_jax.core.schedules import Cosine, FlowMatching, ScaledLinear, ZeroTerminalSNR
from diffusion_jax.guidance import DynamicThreshold, StaticThreshold, Unguided
from diffusion_jax.pretrained.schedulers import CLASSES, beta_schedule, from_config, to_config
from diffusion_jax.pretrained.schedulers.rate_steps import FlowSteps
from diffusion_jax.pretrained.schedulers.ratio_steps import (
    RatioSteps,
    ratios32,
    respaced,
    times_of_ratios,
)
from diffusion_jax.pretrained.schedulers.table_steps import DistilledSteps, PNDMSteps, TableSteps
from diffusion_jax.samplers import sample
from diffusion_jax.samplers.ddim import DDIM
from tests.parity import samplers as parity

CASES = Path(__file__).parents[1] / "parity" / "cases" / "samplers"
MANIFEST = json.loads((CASES / "manifest.json").read_text())["cases"]
RECORDED = {case["id"]: case for case in MANIFEST if case["class"].startswith("diffusers.")}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def config_of(case):
    return {"_class_name": case["class"].rpartition(".")[2], **case["init_kwargs"]}


def scheduler(name, **options):
    return from_config({"_class_name": f"{name}Scheduler", **options})


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_of_every_class_come_back(name):
    """An empty configuration is filled in, survives JSON, and describes the same parts again."""
    first = from_config({"_class_name": name})
    written = json.loads(json.dumps(to_config(first)))
    assert set(written) == {"_class_name", *CLASSES[name].defaults}
    assert from_config(written) == first
    assert first.call == ()


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_configurations_come_back(name):
    config = config_of(RECORDED[name])
    first = from_config(config)
    written = to_config(first)
    assert {key: written[key] for key in config} == config
    assert from_config(written) == first


def test_options_that_another_class_left_behind_say_nothing():
    """SDXL's file names its Euler scheduler and keeps options of the PNDM that it was made of."""
    left = {"clip_sample": True, "sample_max_value": 1.0, "skip_prk_steps": True}
    config = {"_class_name": "EulerDiscreteScheduler", **SD, "steps_offset": 1, **left}
    made, plain = from_config(config), scheduler("EulerDiscrete", **SD, steps_offset=1)
    assert (made.threshold, made.sampler) == (plain.threshold, plain.sampler)
    assert left.items() <= to_config(made).items()
    assert from_config(to_config(made)) == made
    with pytest.raises(ValueError, match="clip_smaple"):
        from_config({**config, "clip_smaple": True})


def test_a_published_configuration_with_private_keys_is_read():
    """Stable Diffusion's own file, with what diffusers writes beside the options."""
    made = scheduler(
        "PNDM", **SD, num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True,
        steps_offset=1, trained_betas=None, clip_sample=False, _diffusers_version="0.7.0.dev0",
        _use_default_values=["timestep_spacing"],
    )  # fmt: skip
    assert made.schedule == ScaledLinear()
    grid = made.grid(50)
    assert int(grid.stop) == 50
    assert np.asarray(grid.levels.t[:2]).tolist() == [981.0, 961.0]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"_class_name": "SASolverScheduler"}, "SASolverScheduler.*UniPCMultistepScheduler"),
        ({}, "_class_name = None"),
        ({"new_option": 1}, "new_option.*beta_end"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'.*'squaredcos_cap_v2'"),
        ({"prediction_type": "score"}, "prediction_type = 'score'.*'epsilon'"),
        ({"solver_order": 4}, "solver_order = 4.*1, 2, 3"),
        ({"solver_order": True}, "solver_order .*must be a number, got True"),
        ({"algorithm_type": "dpmsolver"}, "final_sigmas_type = 'zero'.*'sigma_min'"),
        ({"use_karras_sigmas": True, "use_lu_lambdas": True}, "karras.*lu"),
        ({"use_flow_sigmas": True, "prediction_type": "v_prediction"}, "flow_prediction"),
        ({"flow_shift": 3.0}, "flow_shift = 3.0.*default 1.0"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas.*1000"),
        ({"thresholding": "yes"}, "thresholding = 'yes'.*True or False"),
        ({"timestep_spacing": "karras"}, "timestep_spacing = 'karras'.*'leading'"),
        ({"beta_end": "0.02"}, "beta_end .*must be a number, got '0.02'"),
    ],
)
def test_what_is_not_supported_is_named(options, said):
    config = {"_class_name": "DPMSolverMultistepScheduler"} if options else {}
    with pytest.raises(ValueError, match=said):
        from_config({**config, **options})


@pytest.mark.parametrize(
    "name, options",
    [
        ("UniPCMultistep", {"solver_p": {"a": 1}}),
        ("UniPCMultistep", {"thresholding": True, "predict_x0": False}),
        ("TCD", {"clip_sample": True}),
        ("DDPM", {"variance_type": "fixed_large_log"}),
        ("DDIMInverse", {"timestep_spacing": "linspace"}),
        ("EDMDPMSolverMultistep", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistep", {"use_flow_sigmas": True, "use_beta_sigmas": True}),
    ],
)
def test_values_that_would_be_ignored_or_fail_are_refused(name, options):
    with pytest.raises(ValueError, match="|".join(options)):
        scheduler(name, **options)


def test_arguments_of_a_step_are_not_of_the_configuration():
    config = {"_class_name": "DDIMScheduler", **SD}
    made = from_config(config, eta=0.5, use_clipped_model_output=True)
    assert made.sampler == DDIM(0.5)
    assert dict(made.call) == {"eta": 0.5, "use_clipped_model_output": True}
    assert from_config(to_config(made), **dict(made.call)) == made
    assert from_config(to_config(made)).sampler == DDIM(noise_from="raw_x0")
    with pytest.raises(ValueError, match=r"no order.*eta"):
        from_config(config, order=2)
    with pytest.raises(ValueError, match="eta must lie"):
        from_config(config, eta=1.5)


def test_parts_that_no_option_describes_are_not_written():
    made = scheduler("DDIM")
    with pytest.raises(ValueError, match="not those of its DDIMScheduler options"):
        to_config(dataclasses.replace(made, sampler=DDIM(0.3)))


@pytest.mark.parametrize(
    "name, given, said",
    [
        ("DDIM", {"timesteps": [3, 1]}, "TableSteps takes no timesteps"),
        ("DDIM", {"num_steps": 5, "mu": 1.0}, "TableSteps takes no mu"),
        ("DDIM", {}, "num_steps"),
        ("DDIM", {"num_steps": 1001}, "1001"),
        ("DDPM", {"timesteps": [3, 5]}, "descend"),
        ("DDPM", {"timesteps": [1000, 5]}, "descend"),
        ("EulerDiscrete", {"num_steps": 2, "timesteps": [3, 1]}, "either num_steps"),
        ("LMSDiscrete", {"sigmas": [3.0, 0.0]}, "RatioSteps takes no sigmas"),
        ("FlowMatchEulerDiscrete", {"num_steps": 3, "mu": 1.0}, "FlowSteps takes no mu"),
        ("FlowMatchEulerDiscrete", {"num_steps": 3, "sigmas": [1.0, 0.5]}, "one length"),
        ("PNDM", {"num_steps": 3}, "at least 4"),
        ("LCM", {"num_steps": 51}, "original_inference_steps = 50"),
        ("DPMSolverMultistep", {"num_steps": 5, "max_steps": 4}, "max_steps"),
    ],
)
def test_steps_refuse_what_they_cannot_place(name, given, said):
    with pytest.raises(ValueError, match=said):
        scheduler(name).grid(**given)


def test_offsets_do_not_leave_the_schedule():
    with pytest.raises(ValueError, match="steps_offset = 1 moves"):
        scheduler("DDIM", steps_offset=1).grid(1000)
    with pytest.raises(ValueError, match="dynamic_shifting needs mu"):
        scheduler("FlowMatchEulerDiscrete", use_dynamic_shifting=True).grid(4)


def test_thresholding_goes_before_clipping_and_is_capped():
    assert scheduler("DDPM").threshold == StaticThreshold(1.0)
    assert scheduler("DDPM", clip_sample=False).threshold == Unguided()
    both = scheduler(
        "DDPM", thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5
    )
    assert both.threshold == DynamicThreshold(90.0, 1.5)


def test_zero_terminal_snr_is_finite_only_where_the_class_needs_it():
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert scheduler("DDIM", **options).schedule.alphas_cumprod()[-1] == 0.0
    euler = scheduler("EulerDiscrete", **options)
    assert isinstance(euler.schedule, ZeroTerminalSNR)
    assert euler.schedule.alphas_cumprod()[-1] == 2.0**-24
    assert euler.init_noise_sigma(euler.grid(5)) == pytest.approx(4096.0, rel=1e-6)


def test_a_flow_path_keeps_the_table_that_its_options_name():
    made = scheduler(
        "UniPCMultistep", **SD, use_flow_sigmas=True, flow_shift=3.0,
        prediction_type="flow_prediction",
    )  # fmt: skip
    assert made.schedule == FlowMatching(3.0)
    assert beta_schedule(made) == ScaledLinear()
    grid = made.grid(4)
    alpha, sigma = (np.asarray(f[:5], np.float64) for f in grid.levels[1:])
    np.testing.assert_allclose(alpha + sigma, 1.0, atol=1e-6)
    # s σ / (1 + (s - 1) σ) of uniform σ, told as integers.
    uniform = np.linspace(1.0, 1e-3, 5)[:-1]
    np.testing.assert_allclose(sigma[1:4], (3 * uniform / (1 + 2 * uniform))[1:], rtol=1e-6)
    assert sigma[4] == 0.0
    told = [float(made.time_input(grid.level(i))) for i in range(4)]
    assert told == np.trunc(1000 * sigma[:4]).tolist()
    with pytest.raises(ValueError, match="no table"):
        beta_schedule(scheduler("FlowMatchHeunDiscrete"))


def test_samples_of_classes_with_exploding_variance_are_scaled():
    made = scheduler("EulerDiscrete", **SD, timestep_spacing="leading", steps_offset=1)
    grid = made.grid(10)
    level = grid.level(0)
    ratio = float(level.sigma / level.alpha)
    assert made.init_noise_sigma(grid) == pytest.approx(math.sqrt(ratio**2 + 1), rel=1e-6)
    unit = jnp.ones((2, 3))
    # The class starts with √(1 + r²) z in x/α: z itself on the path that keeps variance.
    np.testing.assert_allclose(made.x_T(unit, grid), 1.0, rtol=1e-6)
    back = made.to_reference(made.from_reference(unit, level), level)
    np.testing.assert_allclose(back, 1.0, rtol=1e-6)
    assert scheduler("DDIM").init_noise_sigma(grid) == 1.0
    edm = scheduler("EDMEuler", sigma_max=50.0)
    assert edm.init_noise_sigma(edm.grid(3)) == pytest.approx(math.hypot(50.0, 1.0))


def test_steps_of_a_stride_end_where_the_peer_ends_them():
    """DDIM steps to t - ⌊T/N⌋ also where the next time is another one."""
    steps, schedule = TableSteps("linspace", end="stride"), ScaledLinear()
    grid = steps.grid(schedule, 12, max_steps=12)
    times = np.round(np.linspace(0, 999, 12))[::-1]
    np.testing.assert_array_equal(grid.levels.t[:12], times)
    np.testing.assert_allclose(grid.ends.alpha[:11], schedule(times[:11] - 83).alpha, rtol=1e-6)
    assert grid.ends.sigma[11] == 0.0
    kept = TableSteps("linspace", end="stride", clean=False).grid(schedule, 12, max_steps=12)
    np.testing.assert_allclose(kept.ends.sigma[11], schedule(0.0).sigma, rtol=1e-6)
    # Where strides meet the next time, the grid is an ordinary one.
    assert TableSteps("leading", end="stride").grid(schedule, 10, max_steps=10).ends is None
    previous = TableSteps("linspace", end="previous").grid(schedule, 12, max_steps=12)
    np.testing.assert_array_equal(previous.ends.t[:11], times[:11] - 1)


def test_inverse_steps_are_told_the_time_that_they_go_to():
    steps = TableSteps("leading", 1, end="stride", clean=False, inverse=True)
    schedule = ScaledLinear()
    grid = steps.grid(schedule, 10, max_steps=10)
    np.testing.assert_array_equal(grid.levels.t[:10], np.arange(10) * 100 + 1)
    np.testing.assert_allclose(grid.levels.alpha[1:10], schedule(np.arange(9) * 100.0 + 1).alpha)
    np.testing.assert_allclose(grid.ends.alpha, schedule(np.arange(10) * 100.0 + 1).alpha)


def test_times_of_ratios_invert_the_table():
    table = ratios32(Cosine())
    times = np.arange(0, 1000, 50)
    np.testing.assert_allclose(times_of_ratios(table[::50], table), times, atol=1e-5)
    halfway = np.sqrt(np.float64(table[10]) * np.float64(table[11]))
    np.testing.assert_allclose(times_of_ratios(np.asarray([halfway]), table), 10.5, atol=1e-4)
    beyond = times_of_ratios(np.asarray([0.0, 1e9]), table)
    np.testing.assert_allclose(beyond, [0.0, 999.0])


def test_respacings_reach_both_ends_in_their_own_way():
    for kind in ("karras", "exponential", "lu", "beta"):
        ends = respaced(kind, 0.01, 10.0, 9)[[0, -1]]
        np.testing.assert_allclose(ends, [10.0, 0.01], rtol=1e-6)
    logs = np.diff(np.log(respaced("exponential", 0.01, 10.0, 9)))
    np.testing.assert_allclose(logs, logs[0])
    roots = np.diff(respaced("karras", 0.01, 10.0, 9) ** (1 / 7))
    np.testing.assert_allclose(roots, roots[0])
    # Beta(0.6, 0.6) is symmetric: its middle quantile is the middle of the range.
    assert respaced("beta", 0.0, 10.0, 9)[4] == pytest.approx(5.0)


def test_noisiest_time_of_solvers_can_be_clipped():
    steps = RatioSteps(integers=True, half_log_snr_min=-2.0)
    times = steps.published(Cosine(), 10).timesteps
    level = Cosine()(times[:1])
    assert np.log(level.alpha / level.sigma)[0] > -2.0
    after = Cosine()(times[:1] + 1)
    assert np.log(after.alpha / after.sigma)[0] < -2.0


def test_log_linear_ratios_have_one_more_than_steps():
    steps = RatioSteps(respacing="log_linear")
    shown = steps.published(ScaledLinear(), 6)
    assert (len(shown.timesteps), len(shown.sigmas)) == (6, 8)
    grid = steps.grid(ScaledLinear(), 6, max_steps=6)
    # The last step ends at the table's least ratio; the final 0 belongs to no step.
    least = ScaledLinear()(0.0)
    np.testing.assert_allclose(grid.next_level(5).alpha, least.alpha, rtol=1e-5)


def test_respacing_of_log_linear_ratios_spans_the_table():
    """The times that it is spaced from are left aside: its own ratios reach both ends."""
    made = scheduler(
        "EulerDiscrete", **SD, interpolation_type="log_linear", use_karras_sigmas=True,
        timestep_spacing="leading",
    )  # fmt: skip
    ratios = made.steps.published(made.schedule, 5).sigmas
    table = ratios32(ScaledLinear())
    np.testing.assert_allclose(ratios[[0, 4, 5]], [table[-1], table[0], 0.0], rtol=1e-6)


def test_middles_lie_at_the_exact_time_of_the_geometric_mean():
    schedule = ScaledLinear()
    grid = RatioSteps(middle="mean").grid(schedule, 8, max_steps=8)
    ratio = np.asarray(grid.levels.sigma / grid.levels.alpha, np.float64)
    middle = np.asarray(grid.middle.sigma / grid.middle.alpha, np.float64)
    np.testing.assert_allclose(middle[:7], np.sqrt(ratio[:7] * ratio[1:8]), rtol=1e-5)
    at = schedule(np.asarray(grid.middle.t[:7], np.float64))
    np.testing.assert_allclose(at.sigma / at.alpha, middle[:7], rtol=1e-4)


def test_stages_of_trajectory_consistency_are_at_floored_times():
    grid = DistilledSteps(50, clean=False, stage=0.3).grid(ScaledLinear(), 4, max_steps=4)
    ends = np.asarray([*grid.levels.t[1:4], 0.0])
    np.testing.assert_array_equal(grid.middle.t, np.floor(0.7 * ends))


def test_stages_of_pndm_land_where_the_peer_puts_them():
    """Runge-Kutta: half a stride below t, then half a stride above the next time."""
    schedule = ScaledLinear()
    grid = PNDMSteps("leading", 1).grid(schedule, 10, max_steps=10)
    times = np.arange(10)[::-1] * 100.0 + 1
    np.testing.assert_array_equal(grid.middle.t[:3, 0], times[:3] - 50)
    np.testing.assert_array_equal(grid.middle.t[:3, 1], times[1:4] + 50)
    plain = PNDMSteps("linspace", runge_kutta=False).grid(schedule, 12, max_steps=12)
    times = np.round(np.linspace(0, 999, 12))[::-1]
    lands, starts = plain.middle.alpha[0]
    np.testing.assert_allclose(lands, schedule(times[0] - 83).alpha, rtol=1e-6)
    np.testing.assert_allclose(starts, schedule(times[1] + 83).alpha, rtol=1e-6)
    assert plain.middle.t[0, 0] == times[1]


def test_dynamic_shift_and_terminal_stretch():
    """exp(μ) takes the place of the shift, and the last rate goes to `terminal`."""
    plain = FlowSteps(dynamic="exponential").published(None, 5, mu=math.log(3.0)).sigmas
    uniform = np.linspace(1.0, 1e-3, 5)
    np.testing.assert_allclose(plain[:-1], 3 * uniform / (1 + 2 * uniform), rtol=1e-6)
    linear = FlowSteps(dynamic="linear").published(None, 5, mu=3.0).sigmas
    np.testing.assert_allclose(linear, plain, rtol=1e-9)
    stretched = FlowSteps(dynamic="linear", terminal=0.1).published(None, 5, mu=3.0).sigmas
    assert stretched[-2] == pytest.approx(0.1)
    assert stretched[0] == 1.0
    shrunk = (1 - stretched[1:-1]) / (1 - linear[1:-1])
    np.testing.assert_allclose(shrunk, 0.9 / (1 - linear[-2]), rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["D_UniPCMultistep__flow", "D_PNDM__skip_prk_False_v_prediction", "D_LMSDiscrete__order2"],
)
def test_the_compiled_loop_draws_the_recorded_sample(name):
    """In float32, with `sample` and a padded grid: what a user of the parts runs."""
    case = RECORDED[name]
    made, arguments = parity._scheduler(case)
    grid = made.grid(**arguments, max_steps=16)
    with np.load(CASES / case["inputs_file"]) as file:
        x = made.from_reference(jnp.asarray(np.moveaxis(file["x_T"], 1, -1)), grid.level(0))
    network = make_denoiser(parity._network, made.parameterization, time_input=made.time_input)

    @jax.jit
    def run(sampler, grid, x):
        denoise = made.threshold(network({"channels": False}), Condition())
        keys = image_keys(0, jnp.arange(len(x)))
        return sample(sampler, lambda x, t: denoise(x, t, Condition()), grid, x, keys)[0]

    last = grid.next_level(int(grid.stop) - 1)
    ours = np.moveaxis(np.asarray(made.to_reference(run(made.sampler, grid, x), last)), -1, 1)
    with np.load(CASES / case["outputs_file"]) as file:
        recorded = file["xs"][-1]
    spec = case["outputs"]["xs"]
    np.testing.assert_allclose(ours, recorded, atol=spec["atol"], rtol=spec["rtol"])
