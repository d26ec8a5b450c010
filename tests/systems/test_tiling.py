"""Autoencoders one image and one tile at a time.

data/tiling.npz was recorded with diffusers 0.42.1 and torch 2.13.0 in float64: `AutoencoderKL` of
../parity/cases/released/ckpt/B01_autoencoder_kl after `enable_tiling()`, with
`tile_sample_min_size` 16 and `tile_latent_min_size` 8, gave `decoded` of `latents` and `moments`
(`encode(…).latent_dist.parameters`) of `image`. All are NHWC.
"""

from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.autoencoder import AutoencoderKLConfig, AutoencoderLevel
from diffusion_jax.pretrained import from_pretrained
from diffusion_jax.systems.tiling import sliced, tiled

TESTS = Path(__file__).resolve().parents[1]
RECORDED = np.load(Path(__file__).parent / "data" / "tiling.npz", allow_pickle=False)


@pytest.fixture(scope="module")
def released():
    """The autoencoder of the recordings: method -> function of parameters and image, parameters."""
    loaded = from_pretrained(TESTS / "parity/cases/released/ckpt/B01_autoencoder_kl")
    return method_of(loaded.module), loaded.params


def method_of(module):
    return lambda method: lambda params, x: module.apply({"params": params}, x, method=method)


def nearest(x):
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def every_second(x):
    return x[:, ::2, ::2]


def counted(shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


def test_slices_are_the_batch(released):
    call, params = released
    sizes = []

    def seen(image):
        sizes.append(image.shape[0])
        return call("encode")(params, image)

    ours = jax.jit(sliced(seen))(RECORDED["image"])
    whole = jax.jit(call("encode"))(params, RECORDED["image"])
    assert set(sizes) == {1} and len(whole.mean) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, whole)


def test_slices_take_several_arguments():
    x, keys = jnp.zeros((3, 2, 2, 1)), jax.random.split(jax.random.key(0), 3)
    noisy = jax.vmap(lambda image, key: image + jax.random.normal(key, image.shape))
    np.testing.assert_array_equal(sliced(noisy)(x, keys), noisy(x, keys))


@pytest.mark.parametrize(
    "fn, tile, overlap, scale",
    [
        (lambda x: 3.0 * x, 8, 2, 1),
        (lambda x: 3.0 * x, 8, 0, 1),
        (nearest, 8, 2, 2),
        (nearest, 6, 4, 2.0),
        (every_second, 8, 4, Fraction(1, 2)),
        (every_second, 16, 8, 0.5),
    ],
)
@pytest.mark.parametrize("size", [(6, 4), (8, 26), (38, 30)])
def test_a_local_function_comes_out_exactly(fn, tile, overlap, scale, size):
    x = counted((2, *size, 3))
    ours = jax.jit(tiled(fn, tile=tile, overlap=overlap, scale=scale))(x)
    np.testing.assert_array_equal(ours, fn(x))


def test_an_image_that_fits_is_not_cut():
    x = counted((1, 8, 7, 1))
    ours = tiled(lambda t: t - t.mean(), tile=8, overlap=2, scale=1)(x)
    np.testing.assert_array_equal(ours, x - x.mean())


def test_the_seam_is_a_straight_ramp():
    # Every tile is what its first pixel is; tiles begin at 0 and 4.
    x = jnp.zeros((1, 1, 10, 1)).at[0, 0, 4].set(1.0)
    ours = tiled(lambda t: jnp.broadcast_to(t[:, :, :1], t.shape), tile=8, overlap=4, scale=1)(x)
    # The third tile begins at 8 with a zero; it shares both of its pixels.
    np.testing.assert_array_equal(ours[0, 0, :, 0], [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 0.5])


@pytest.mark.parametrize(
    "method, source, result, options",
    [
        # Both have a row or a column of tiles of which the one before covers every pixel.
        ("decode", "latents", "decoded", {"tile": 8, "overlap": 2, "scale": 2}),
        ("moments", "image", "moments", {"tile": 16, "overlap": 4, "scale": Fraction(1, 2)}),
    ],
)
def test_numbers_are_those_of_diffusers(released, method, source, result, options):
    call, params = released

    def by_tiles(params, x):
        return tiled(lambda tile: call(method)(params, tile), **options)(x)

    ours = jax.jit(by_tiles)(params, RECORDED[source])
    np.testing.assert_allclose(ours, RECORDED[result], atol=2e-5)


def test_the_dtype_is_that_of_the_function():
    x = counted((1, 12, 9, 1))
    ours = tiled(lambda t: t.astype(jnp.bfloat16), tile=8, overlap=2, scale=1)(x)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, x.astype(jnp.bfloat16))


def test_memory_is_that_of_a_tile():
    levels = (AutoencoderLevel(8, 1), AutoencoderLevel(16, 1))
    # Without attention, whose logits XLA may leave out of its account on a CPU.
    module = AutoencoderKLConfig(levels=levels, norm_groups=4, middle_attention=False).build()
    image = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), image)["params"])
    decode = method_of(module)("decode")

    def by_tiles(params, z):
        return tiled(lambda tile: decode(params, tile), tile=16, overlap=4, scale=2)(z)

    def temporary(fn):
        z = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
        return jax.jit(fn).lower(params, z).compile().memory_analysis().temp_size_in_bytes

    assert temporary(by_tiles) < temporary(decode) / 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tile": 0}, "tile must be at least 1, got 0"),
        ({"tile": 8.0}, "tile must be an int, got 8.0"),
        ({"overlap": 0.25}, "overlap must be an int, got 0.25"),
        ({"overlap": 8}, r"overlap must lie in \[0, tile = 8\), got 8"),
        ({"overlap": -1}, "overlap must lie in"),
        ({"scale": 0}, "scale must be above 0 and finite, got 0"),
        ({"scale": float("nan")}, "scale must be above 0 and finite, got nan"),
        ({"scale": Fraction(1, 16)}, "tile must be a multiple of 16, .* got 8"),
        ({"scale": 0.25}, "overlap must be a multiple of 4, .* got 2"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiled(nearest, **{"tile": 8, "overlap": 2, "scale": 2, **options})


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (1, 12, 12, 3)])
@pytest.mark.parametrize("fn", [nearest, lambda x: x.astype(jnp.int32), lambda x: x.mean(3)])
def test_functions_of_another_scale_or_kind_are_refused(fn, shape):
    with pytest.raises(ValueError, match="at the scale of 1 the function must give floating"):
        tiled(fn, tile=8, overlap=2, scale=1)(jnp.zeros(shape))


def test_images_that_do_not_fit_are_refused():
    halved = tiled(every_second, tile=8, overlap=2, scale=0.5)
    with pytest.raises(ValueError, match=r"cut from \[B, H, W, C\], got \(8, 8, 3\)"):
        halved(jnp.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match="the width must be a multiple of 2, .* got 13"):
        halved(jnp.zeros((1, 12, 13, 3)))
