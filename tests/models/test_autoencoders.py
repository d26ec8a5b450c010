"""Autoencoders: the Gaussian, the codebook, the spatial norm, the tiny one, published sizes."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models import vq
from diffusion_jax.models.autoencoder import (
    AutoencoderKLConfig,
    AutoencoderLevel,
    DiagonalGaussian,
    PixelEncoder,
    diagonal_gaussian,
)
from diffusion_jax.models.first_stages import FIRST_STAGES
from diffusion_jax.models.tiny_autoencoder import UPSAMPLINGS, AutoencoderTinyConfig
from diffusion_jax.models.vq import SpatialNorm, VQModelConfig, nearest_codes
from tests.models.trees import random_params

LEVELS = (AutoencoderLevel(4, num_blocks=1), AutoencoderLevel(8, num_blocks=1, attention=True))
KL = AutoencoderKLConfig(levels=LEVELS, norm_groups=2)
VQ = VQModelConfig(levels=LEVELS, norm_groups=2, num_codes=5)
MOVQ = VQModelConfig(
    levels=(AutoencoderLevel(32, num_blocks=1), AutoencoderLevel(32, num_blocks=1, attention=True)),
    middle_attention=False,
    norm="spatial",
    norm_groups=8,
    latent_channels=4,
    num_codes=5,
)
TINY = AutoencoderTinyConfig(
    encoder_channels=4, decoder_channels=6, encoder_blocks=(1, 1), decoder_blocks=(1, 0)
)
CONFIGS = {"kl": KL, "vq": VQ, "movq": MOVQ, "tiny": TINY}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def keys(*numbers):
    return jnp.stack([jax.random.key(number) for number in numbers])


def shapes(config):
    size = config.factor
    image = jax.ShapeDtypeStruct((1, size, size, config.in_channels), np.float32)
    return jax.eval_shape(config.build().init, jax.random.key(0), image)["params"]


# Counted in the authors' own code, on configurations of their repositories.
PUBLISHED = {
    "kl-f4": 55_312_063,
    "kl-f8": 83_653_863,
    "kl-f16": 69_610_963,
    "kl-f32": 103_880_131,
    "vq-f4": 55_322_782,
    "vq-f4-noattn": 53_219_486,
    "vq-f8": 67_717_295,
    "vq-f8-n256": 67_652_783,
    "vq-f16": 69_593_371,
    "sd": 83_653_863,
    "sdxl": 83_653_863,
    "movq": 67_832_495,
    "taesd": 2_445_063,
}


@pytest.mark.parametrize("name, count", PUBLISHED.items(), ids=PUBLISHED)
def test_published_sizes(name, count):
    config = FIRST_STAGES[name]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(config))) == count
    stride = {"kl-f4": 4, "kl-f16": 16, "kl-f32": 32, "vq-f16": 16, "vq-f4": 4, "vq-f4-noattn": 4}
    assert config.factor == stride.get(name, 8)


def test_every_published_autoencoder_is_counted():
    assert PUBLISHED.keys() == FIRST_STAGES.keys()


def test_the_log_variance_is_clamped_and_the_mean_is_not():
    moments = np.asarray([[[[-50.0, 40.0, 1.0, -31.0, 21.0, 0.5]]]], np.float32)
    mean, logvar = diagonal_gaussian(moments)
    np.testing.assert_array_equal(mean[0, 0, 0], [-50.0, 40.0, 1.0])
    np.testing.assert_array_equal(logvar[0, 0, 0], [-30.0, 20.0, 0.5])
    assert diagonal_gaussian(moments.astype(jnp.bfloat16)).logvar.dtype == jnp.float32


def test_the_divergence_is_the_integral():
    """∫ p log (p / q) on a fine grid, summed over the numbers of an image."""
    mean, logvar = normal(0, 2, 1, 2, 3), normal(1, 2, 1, 2, 3)
    x = np.linspace(-15.0, 15.0, 30001)[:, None, None, None, None]
    log_p = -0.5 * ((x - mean) ** 2 / np.exp(logvar) + logvar)
    log_q = -0.5 * x**2
    integrand = np.exp(log_p) / math.sqrt(2 * math.pi) * (log_p - log_q)
    expected = (integrand.sum(0) * 30.0 / 30000).sum((1, 2, 3))
    np.testing.assert_allclose(DiagonalGaussian(mean, logvar).kl(), expected, rtol=1e-4)


def test_an_image_draws_from_its_own_key():
    mean = jnp.broadcast_to(jnp.asarray([2.0, -1.0]), (3, 32, 32, 2))
    posterior = DiagonalGaussian(mean, jnp.full_like(mean, 2.0 * math.log(0.5)))
    drawn = posterior.sample(keys(1, 2, 1))
    np.testing.assert_array_equal(drawn[0], drawn[2])
    alone = DiagonalGaussian(mean[1:2], posterior.logvar[1:2]).sample(keys(2))
    np.testing.assert_array_equal(drawn[1], alone[0])
    # Four standard errors of a mean and of a deviation over 1024 draws.
    np.testing.assert_allclose(drawn[:2].mean((1, 2)), mean[:2, 0, 0], atol=4 * 0.5 / 32)
    np.testing.assert_allclose(drawn[:2].std((1, 2)), 0.5, atol=4 * 0.5 / 45)


@pytest.mark.parametrize("name", ["movq", "tiny"])
def test_bfloat16_computes_what_float32_does(name):
    """Between them these two have every layer that there is."""
    config = CONFIGS[name]
    channels, size = config.latent_channels, (2, 5, 6)
    image, latents = normal(0, *size, 3), normal(1, *size, channels)
    params = random_params(config.build(), image[:1, :2, :2], scale=0.3)

    def both(dtype):
        module = config.build(dtype=dtype, param_dtype=dtype)
        cast = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)

        @jax.jit
        def apply(params):
            encoded = module.apply({"params": params}, image, method="encode")
            options = {} if name == "tiny" else {"quantize": False}
            decoded = module.apply({"params": params}, latents, method="decode", **options)
            return encoded, decoded

        return apply(cast)

    encoded, decoded = both("float32")
    # Half of an odd height is rounded down, but up by the tiny one, which pads on both sides.
    assert encoded.shape == (2, 3 if name == "tiny" else 2, 3, channels)
    assert decoded.shape == (2, 10, 12, 3)
    for ours, exact in zip(both("bfloat16"), (encoded, decoded), strict=True):
        assert ours.dtype == jnp.bfloat16
        scale = np.abs(exact).max()
        assert 0.0 < np.abs(ours.astype(np.float32) - exact).mean() < 0.03 * scale


def test_the_activation_before_the_last_convolution_is_always_silu():
    config = AutoencoderKLConfig(levels=(AutoencoderLevel(4, 1),), norm_groups=2, act="relu")
    module = PixelEncoder(config, norm_groups=2, features=1)
    x = np.zeros((1, 2, 2, 3), np.float32)
    params = jax.tree.map(np.zeros_like, random_params(module, x))
    params["norm_out"]["bias"][:] = -1.0
    params["conv_out"]["kernel"][1, 1] = 1.0
    expected = 4 * -1.0 / (1.0 + math.exp(1.0))
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-6)


def test_the_spatial_norm_is_its_formula():
    x, latent = normal(0, 2, 4, 6, 8), normal(1, 2, 2, 3, 5)
    module = SpatialNorm(groups=2)
    params = random_params(module, x, latent)
    groups = x.reshape(2, 24, 2, 4).astype(np.float64)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    h = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    h = h * params["norm"]["scale"] + params["norm"]["bias"]
    scale, shift = (
        latent @ params[name]["kernel"][0, 0] + params[name]["bias"] for name in ("scale", "shift")
    )
    rows, columns = np.arange(4) // 2, np.arange(6) // 2
    expected = h * scale[:, rows][:, :, columns] + shift[:, rows][:, :, columns]
    ours = module.apply({"params": params}, x, latent)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_nearest_code_by_brute_force(monkeypatch):
    """In pieces too: of 42 pixels, 4 at once."""
    latents, codebook = normal(0, 2, 7, 3, 4), normal(1, 11, 4)
    expected = np.square(latents[..., None, :] - codebook).sum(-1).argmin(-1)
    np.testing.assert_array_equal(nearest_codes(latents, codebook), expected)
    monkeypatch.setattr(vq, "MAX_DISTANCES", 44)
    np.testing.assert_array_equal(nearest_codes(latents, codebook), expected)
    twice = np.concatenate([codebook, codebook])
    np.testing.assert_array_equal(nearest_codes(latents, twice), expected)


def quantize(codebook, latents):
    params = {"params": {"codebook": codebook}}
    return VQ.build().apply(params, latents, method="quantize")


def test_quantization_and_its_gradients():
    """Codes, 1 · commitment + ¼ · codebook loss, and a gradient that passes straight through."""
    latents, codebook, weight = normal(0, 2, 3, 3, 3), normal(1, 5, 3), normal(2, 2, 3, 3, 3)

    @jax.jit
    def run(codebook, latents):
        through = jax.grad(lambda c, z: (quantize(c, z).latents * weight).sum(), (0, 1))
        loss = jax.grad(lambda c, z: quantize(c, z).loss, (0, 1))
        return quantize(codebook, latents), through(codebook, latents), loss(codebook, latents)

    (codes, indices, loss), (of_codebook, of_latents), of_loss = run(codebook, latents)
    np.testing.assert_array_equal(codes, codebook[indices])
    error = latents - codebook[indices]
    np.testing.assert_allclose(loss, 1.25 * np.square(error).mean(), rtol=1e-6)

    np.testing.assert_array_equal(of_latents, weight)
    np.testing.assert_array_equal(of_codebook, 0.0)

    of_codebook, of_latents = of_loss
    np.testing.assert_allclose(of_latents, 2.0 * error / error.size, rtol=1e-5)
    expected = np.zeros_like(codebook)
    np.add.at(expected, np.asarray(indices).ravel(), -0.5 * error.reshape(-1, 3) / error.size)
    np.testing.assert_allclose(of_codebook, expected, rtol=1e-5, atol=1e-8)


def test_decoding_quantizes_unless_told_otherwise():
    latents, params = normal(0, 1, 2, 2, 3), {"params": {"codebook": normal(1, 5, 3)}}
    by_index = dataclasses.replace(VQ, lookup_from_codebook=True)

    def caught(call, args, options, context):
        return args[0] if context.method_name == "decode_codes" else call(*args, **options)

    def decoded(config, latents, **options):
        """What the decoder is given."""
        with nn.intercept_methods(caught):
            return config.build().apply(params, latents, method="decode", **options)

    codes, indices, _ = VQ.build().apply(params, latents, method="quantize")
    np.testing.assert_array_equal(decoded(VQ, latents), codes)
    np.testing.assert_array_equal(decoded(VQ, latents, quantize=False), latents)
    np.testing.assert_array_equal(decoded(by_index, latents), codes)
    np.testing.assert_array_equal(decoded(by_index, indices, quantize=False), codes)


def test_tiny_latents_are_bounded_and_scaled():
    module = TINY.build()
    params = {"params": random_params(module, normal(0, 1, 2, 2, 3), scale=0.3)}
    decode = jax.jit(lambda z: module.apply(params, z, method="decode"))
    latents = normal(1, 1, 2, 2, 4)
    far = decode(1e4 * latents)
    np.testing.assert_array_equal(decode(1e6 * latents), far)
    assert np.abs(decode(latents) - far).max() > 0.01
    config = AutoencoderTinyConfig(latent_magnitude=2.0, latent_shift=0.25)
    np.testing.assert_allclose(
        config.scale_latents(np.asarray([-9.0, -1.0, 0.0, 2.0, 9.0])), [0, 0, 0.25, 0.75, 1]
    )
    np.testing.assert_allclose(config.unscale_latents(np.asarray([0.25, 0.75])), [0.0, 2.0])


def test_upsamplings_keep_a_constant_and_repeat_a_pixel():
    x = np.broadcast_to(normal(0, 1, 1, 1, 2), (1, 2, 3, 2))
    for upsample in UPSAMPLINGS.values():
        np.testing.assert_allclose(upsample(x, 4, 6), np.broadcast_to(x[:, :1, :1], (1, 4, 6, 2)))
    ramp = np.asarray([0.0, 1.0], np.float32).reshape(1, 1, 2, 1)
    # Centres of the four pixels lie at -1/4, 1/4, 3/4 and 5/4 of the two.
    np.testing.assert_allclose(
        UPSAMPLINGS["bilinear"](ramp, 1, 4).ravel(), [0.0, 0.25, 0.75, 1.0], atol=1e-7
    )


@pytest.mark.parametrize("config", [KL, VQ], ids=["kl", "vq"])
def test_float16_is_computed_in_float32_where_the_weights_may_overflow(config):
    forced, plain = (dataclasses.replace(config, force_upcast=each) for each in (True, False))
    assert forced.build(dtype="float16", param_dtype="float16").dtype == jnp.float32
    assert plain.build(dtype="float16").dtype == jnp.float16
    assert forced.build(dtype="bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AutoencoderKLConfig(act="tanh"), "act must be one of .*'tanh'"),
        (lambda: AutoencoderKLConfig(levels=()), "non-empty tuple"),
        (lambda: AutoencoderKLConfig(norm_groups=48), "multiple of the 48 groups"),
        (lambda: AutoencoderKLConfig(up_levels=LEVELS, norm_groups=2), "got 2 and 4"),
        (lambda: AutoencoderKLConfig(z_channels=3, quant_conv=False), "latent_channels = 4, got 3"),
        (lambda: AutoencoderKLConfig(latents_mean=(1.0,)), "one number for each of the 4"),
        (lambda: AutoencoderLevel(0), "channels must be at least 1, got 0"),
        (lambda: VQModelConfig(norm="batch"), "'group' or 'spatial', got 'batch'"),
        (lambda: VQModelConfig(num_codes=0), "num_codes must be at least 1"),
        (
            lambda: VQModelConfig(levels=LEVELS, norm_groups=2, norm="spatial"),
            "multiple of the 32 groups of its norms, got channels = 4",
        ),
        (lambda: AutoencoderTinyConfig(upsample="area"), "upsample must be one of"),
        (lambda: AutoencoderTinyConfig(encoder_blocks=()), "encoder_blocks must be a non-empty"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_shapes_are_refused(name):
    module = CONFIGS[name].build()
    with pytest.raises(ValueError, match=r"image must have shape \[B, H, W, 3\], got \(1, 4, 4\)"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 4)))
    params = {"params": shapes(CONFIGS[name])}
    with pytest.raises(ValueError, match="latents must have shape .* got"):
        jax.eval_shape(lambda p: module.apply(p, jnp.zeros((1, 4, 4, 9)), method="decode"), params)
