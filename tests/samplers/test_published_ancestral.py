"""Options of DDIM and DDPM that reproduce published code, against that code's formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import image_keys, per_image_normal
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.schedules import Cosine, Linear
from diffusion_jax.core.types import NoiseLevel, Prediction
from diffusion_jax.guidance import StaticThreshold
from diffusion_jax.samplers import DDIM, DDPM, StepInfo

KEYS = image_keys(0, range(4))
INFO = StepInfo(0, 0, 1)
CLEAN = NoiseLevel(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(0.0))
X = jnp.asarray([[0.9, -1.4], [0.1, 2.0], [-0.3, 0.4], [1.0, 1.5]], jnp.float32)
X0 = jnp.asarray([[0.8, -1.2], [0.2, 0.4], [-2.0, 0.1], [0.3, 0.9]], jnp.float32)


def level_at(t, schedule=Linear()):
    return NoiseLevel(*(jnp.float32(field) for field in schedule(np.asarray(float(t)))))


def clipped(limit):
    """A denoiser that always says X0, thresholded."""
    guided = StaticThreshold(limit)(lambda x, level, cond: Prediction(X0), Condition())
    return lambda x, level: guided(x, level, Condition())


def step(sampler, denoise, level, next_level):
    return np.asarray(
        sampler.step(KEYS, denoise, sampler.init(X), level, next_level, INFO).x, np.float64
    )


@pytest.mark.parametrize("noise_from", ["x0", "raw_x0"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_takes_the_noise_from_either_x0(noise_from, eta):
    """Eq. 12 in ᾱ with x0 clipped at 0.5, ε of the clipped x0 or of the one before."""
    t, s = 600, 350
    at, as_ = Linear().alphas_cumprod()[[t, s]]
    x0 = np.clip(X0, -0.5, 0.5)
    eps = (X - np.sqrt(at) * (x0 if noise_from == "x0" else X0)) / np.sqrt(1 - at)
    std = eta * np.sqrt((1 - as_) / (1 - at)) * np.sqrt(1 - at / as_)
    noise = per_image_normal(KEYS, X)
    expected = np.sqrt(as_) * x0 + np.sqrt(1 - as_ - std**2) * eps + std * noise
    out = step(DDIM(eta, noise_from=noise_from), clipped(0.5), level_at(t), level_at(s))
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


def test_both_noises_are_one_without_a_threshold():
    def denoise(x, level):
        return Prediction(X0)

    pair = level_at(600), level_at(350)
    outs = [step(DDIM(noise_from=name), denoise, *pair) for name in ("x0", "raw_x0")]
    np.testing.assert_array_equal(*outs)


def test_ddpm_can_add_noise_at_the_end():
    """A last step that starts at t = 40: std from β = 1 - ᾱ_t and β̃ = 1e-20."""
    beta = 1 - Linear().alphas_cumprod()[40]
    frac, noise = 0.9, np.asarray(per_image_normal(KEYS, X))
    stds = {
        "small": 1e-10,
        "large": beta**0.5,
        "learned_range": beta ** (frac / 2) * 1e-20 ** ((1 - frac) / 2),
        "learned": 0.2,
    }

    def denoise(x, level):
        return Prediction(X0, jnp.full(x.shape, frac), jnp.full(x.shape, np.log(0.04)))

    for variance, std in stds.items():
        out = step(DDPM(variance, noise_at_end=True), denoise, level_at(40), CLEAN)
        np.testing.assert_allclose(out, X0 + std * noise, rtol=0, atol=2e-6, err_msg=variance)


@pytest.mark.parametrize("t, s", [(700, 600), (2, 1), (0, None)])
def test_ddpm_rounds_as_unclip_does(t, s):
    """Eq. 7 with a float32 table of ᾱ and the table's own β, the way UnCLIP's scheduler does."""
    table = Cosine().alphas_cumprod().astype(np.float32)
    at, as_ = table[t], np.float32(1.0) if s is None else table[s]
    neighbours = s is None or s == t - 1
    beta = np.float32(Cosine().betas()[t]) if neighbours else 1 - at / as_
    towards_x0 = np.sqrt(as_) * beta / (1 - at)
    towards_x = np.sqrt(1 - beta) * (1 - as_) / (1 - at)
    end = CLEAN if s is None else level_at(s, Cosine())
    x0, x = np.asarray(X0, np.float64), np.asarray(X, np.float64)
    expected = towards_x0 * x0 + towards_x * x
    means = {
        variant: np.asarray(
            DDPM("small", variant=variant).moments(Prediction(X0), X, level_at(t, Cosine()), end)[0]
        )
        for variant in ("exact", "unclip")
    }
    # The float32 table is a product of t factors, each of them rounded.
    np.testing.assert_allclose(means["unclip"], expected, rtol=2e-5 if s is None else 1e-3)
    if s is None:
        np.testing.assert_allclose(means["exact"], x0, rtol=1e-6)
        assert np.abs(means["unclip"] / x0 - 1).min() > 4e-4
    else:
        np.testing.assert_allclose(means["exact"], expected, rtol=1e-3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DDIM(noise_from="eps"), r"\('x0', 'raw_x0'\), got 'eps'"),
        (lambda: DDPM(variant="karlo"), r"\('exact', 'unclip'\), got 'karlo'"),
    ],
)
def test_unknown_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
