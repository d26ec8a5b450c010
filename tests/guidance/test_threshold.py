"""Thresholds: clipping, its effect on the noise that samplers derive, and the percentile form."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.schedules import Linear
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.guidance import DynamicThreshold, StaticThreshold
from diffusion_jax.samplers import DDIM, DPMSolverMultistep, Euler, Heun, StepInfo

RNG = np.random.default_rng(0)
X0 = RNG.normal(0.0, 1.2, (3, 4, 4, 2)).astype(np.float32)
LEVEL = NoiseLevel(*(jnp.float32(field) for field in Linear()(np.asarray(500.0))))
NEXT = NoiseLevel(*(jnp.float32(field) for field in Linear()(np.asarray(400.0))))


def says(x0, var_frac=None):
    return lambda x, level, cond: Prediction(jnp.asarray(x0), var_frac)


def apply(threshold, x0, var_frac=None):
    denoise = threshold(says(x0, var_frac), Condition())
    return denoise(jnp.zeros(x0.shape), LEVEL, Condition())


def test_static_threshold_clips_x0_and_nothing_else():
    fraction = jnp.full(X0.shape, 2.0)
    prediction = apply(StaticThreshold(0.8), X0, fraction)
    np.testing.assert_array_equal(prediction.x0, np.clip(X0, -0.8, 0.8))
    np.testing.assert_array_equal(prediction.var_frac, fraction)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.5, 100.0])
def test_dynamic_threshold_is_the_papers_formula(percentile):
    """Imagen: s = max(percentile of |x0| per image, 1), then clip to ±s and divide by s."""
    x0 = X0 * np.asarray([0.3, 1.0, 4.0], np.float32)[:, None, None, None]
    out = np.asarray(apply(DynamicThreshold(percentile), x0).x0)
    for image, got in zip(x0, out, strict=True):
        s = max(np.percentile(np.abs(image), percentile), 1.0)
        np.testing.assert_allclose(got, np.clip(image, -s, s) / s, rtol=1e-5, atol=1e-6)
    assert np.abs(out).max() <= 1.0


def test_dynamic_threshold_of_images_in_range_is_static():
    """Where the percentile is at most 1, s = 1."""
    x0 = X0 * 0.5
    dynamic = apply(DynamicThreshold(60.0), x0).x0
    np.testing.assert_array_equal(dynamic, apply(StaticThreshold(1.0), x0).x0)


@pytest.mark.parametrize("largest, divisor", [(None, 4.0), (9.0, 4.0), (2.0, 2.0), (0.5, 0.5)])
def test_dynamic_threshold_can_be_capped(largest, divisor):
    """The largest of |x̂0| is 4, so that s is 4 or the cap."""
    x0 = np.asarray([[4.0, -1.0, 0.2]], np.float32)
    out = apply(DynamicThreshold(100.0, largest), x0).x0
    np.testing.assert_allclose(out, np.clip(x0, -divisor, divisor) / divisor, rtol=1e-6)


@pytest.mark.parametrize(
    "sampler", [Euler(), DDIM(), Heun(), DPMSolverMultistep()], ids=lambda s: type(s).__name__
)
def test_samplers_derive_the_noise_from_the_clipped_x0(sampler):
    """x_s = α_s x̂ + σ_s (x - α x̂) / σ with x̂ clipped: eps of the raw x0 would be another."""
    x = jnp.full((2, 1), 0.3)
    threshold = StaticThreshold(1.0)
    denoise = threshold(says(np.asarray([[5.0], [-0.2]], np.float32)), Condition())
    end = NEXT if not isinstance(sampler, Heun) else NEXT._replace(sigma=jnp.float32(0.0))
    out = sampler.step(
        image_keys(0, range(2)),
        lambda x, level: denoise(x, level, Condition()),
        sampler.init(x),
        LEVEL,
        end,
        StepInfo(0, 0, 1),
    ).x
    x0 = np.asarray([[1.0], [-0.2]])
    eps = (np.asarray(x) - float(LEVEL.alpha) * x0) / float(LEVEL.sigma)
    expected = float(end.alpha) * x0 + float(end.sigma) * eps
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "bad, message",
    [
        (StaticThreshold(0.0), "limit must be positive, got 0.0"),
        (StaticThreshold(float("nan")), "limit"),
        (DynamicThreshold(0.0), "percentile"),
        (DynamicThreshold(100.1), "got 100.1"),
        (DynamicThreshold(largest=0.0), "largest must be positive or None, got 0.0"),
    ],
)
def test_bad_values_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        bad.validate()
    StaticThreshold().validate()
    DynamicThreshold(100.0).validate()
