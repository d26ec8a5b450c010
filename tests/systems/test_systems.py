"""Systems: stages assembled of parts train, sample, and compile once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core.arrays import as_arrays, image_keys
from diffusion_jax.core.parameterization import EDMPreconditioning, Eps, FlowVelocity, Score, V
from diffusion_jax.core.schedules import (
    EDM,
    Cosine,
    CosineLogSNR,
    FlowMatching,
    Linear,
    ZeroTerminalSNR,
)
from diffusion_jax.core.timesteps import Steps, karras, trailing
from diffusion_jax.guidance import ClassifierFree, ClassifierGuidance, StaticThreshold, Unguided
from diffusion_jax.losses import VLB, Hybrid, LossAware
from diffusion_jax.models import MLPConfig
from diffusion_jax.samplers import DDIM, DDPM
from diffusion_jax.systems import ClassifierFreeSystem, DDPMSystem
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.optimizer import Optimizer
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys

SYSTEM = ClassifierFreeSystem(
    image_size=4,
    channels=1,
    network=MLPConfig(width=16, depth=1),
    schedule=Cosine(),
    parameterization=V(),
    sampler=DDIM(),
    steps=Steps(num_steps=4, max_steps=8),
    num_classes=3,
)
STAGE = SYSTEM.build().stages["base"]
LABELS = {"label": jnp.asarray([0, 1, 2, 0], jnp.int32)}
KEYS = image_keys(0, np.arange(4))


def params_of(stage):
    """Parameters with every leaf random: output layers start at zero otherwise."""
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32), shapes
    )


PARAMS = params_of(STAGE)
TRACES = []


@jax.jit
def draw(params, batch, keys, guide, sampler, grid):
    TRACES.append(1)
    return STAGE.sample(params, batch, keys, guide=guide, sampler=sampler, grid=grid)


def drawn(*, scale=2.0, eta=0.5, steps=4, labels=LABELS, keys=KEYS):
    grid = trailing(SYSTEM.schedule, steps, max_steps=8)
    guide = as_arrays(SYSTEM.guide(scale))
    return draw(PARAMS, labels, keys, guide, as_arrays(DDIM(eta=eta)), grid)


def test_one_compilation_for_scale_eta_seed_label_and_steps():
    reference = drawn()
    others = [
        drawn(scale=3),
        drawn(eta=0.9),
        drawn(steps=7),
        drawn(labels={"label": LABELS["label"][::-1]}),
        drawn(keys=image_keys(7, np.arange(4))),
    ]
    assert len(TRACES) == 1
    for other in others:
        assert other.shape == (4, 4, 4, 1) and np.isfinite(other).all()
        assert np.abs(other - reference).max() > 1e-4


@pytest.mark.slow
def test_scale_1_is_the_conditional_model_and_scale_0_ignores_the_label():
    conditional = STAGE.sample(
        PARAMS,
        LABELS,
        KEYS,
        guide=StaticThreshold(),
        grid=trailing(Cosine(), 4, max_steps=8),
        sampler=DDIM(eta=0.5),
    )
    np.testing.assert_allclose(drawn(scale=1), conditional, atol=1e-5)
    other = {"label": (LABELS["label"] + 1) % 3}
    np.testing.assert_allclose(drawn(scale=0), drawn(scale=0, labels=other), atol=1e-5)


def test_defaults_of_the_stage_are_those_of_the_configuration():
    assert STAGE.guide.guides == (ClassifierFree(1.5), StaticThreshold())
    assert STAGE.sampler == DDIM()
    assert int(STAGE.grid.stop) == 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unconditional_loss_and_sample(dtype):
    """Either dtype gives finite float32 results, at both ends of the grid."""
    system = DDPMSystem(
        image_size=4,
        channels=1,
        network=MLPConfig(width=16, depth=1),
        dtype=dtype,
        schedule=Linear(),
        sampler=DDPM("small"),
        steps=Steps(num_steps=3, max_steps=3),
    )
    stage = system.build().stages["base"]
    params = params_of(stage)
    batch = {"image": jnp.zeros((4, 4, 4, 1)), **LABELS}
    loss, metrics = stage.loss(params, batch, KEYS)
    assert loss.dtype == jnp.float32 and np.isfinite(loss)
    assert set(metrics) == {f"loss_q{k}" for k in range(4)}
    images = system.build().sample({"base": params}, batch, KEYS)
    assert images.dtype == jnp.float32 and np.abs(images).max() <= 1.0


@pytest.mark.slow
def test_only_what_the_globs_name_is_trained():
    tx = Optimizer(learning_rate=0.1).build()
    state = TrainState.create(params_of(STAGE), tx, trainable=("conditioner/**",))
    frozen = jax.tree.map(np.asarray, state.frozen)
    before = np.asarray(state.trainable["conditioner"]["embedding"])
    step = jax.jit(make_train_step(STAGE.loss, tx, ema=EMA(0.9)))
    batch = {"image": 0.1 * jnp.ones((4, 4, 4, 1)), **LABELS}
    for number in range(3):
        state, _ = step(state, batch, step_keys(jax.random.key(0), number, 4))
    jax.tree.map(np.testing.assert_array_equal, frozen, dict(state.frozen))
    assert np.abs(state.trainable["conditioner"]["embedding"] - before).max() > 0.01
    # Two moments of one [4, D] table and counters: nothing for the frozen network.
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments <= 2 * before.size + 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schedule": ZeroTerminalSNR(), "parameterization": Eps()}, "'flow' or 'x0'"),
        ({"schedule": ZeroTerminalSNR(), "parameterization": Score()}, "'flow' or 'x0'"),
        ({"schedule": ZeroTerminalSNR(), "parameterization": EDMPreconditioning()}, "divides"),
        ({"schedule": ZeroTerminalSNR(), "time_input": "edm"}, r"one of \['t'\]"),
        ({"schedule": CosineLogSNR()}, r"one of \['scaled_t', 'edm'\].*from 0.0 to 1.0"),
        ({"time_input": "scaled_t"}, r"one of \['t', 'edm'\]"),
        ({"schedule": EDM()}, r"one of \['edm'\]"),
        ({"sampler": DDPM("learned_range")}, "learns the variance"),
        ({"sampler": DDPM("interpolated", fraction=1.5)}, r"fraction must lie in \[0, 1\]"),
        ({"time_input": "seconds"}, "'seconds'"),
        ({"schedule": CosineLogSNR(), "time_input": "rescaled_t"}, "for discrete schedules"),
        ({"schedule": FlowMatching()}, r"one of \['scaled_t'\]"),
        ({"guidance": ClassifierGuidance()}, "no classifier for ClassifierGuidance"),
        (
            {
                "schedule": ZeroTerminalSNR(),
                "guidance": ClassifierFree(2.0, rescale=0.7, rescale_in="eps"),
            },
            "rescale_in 'eps' divides by alpha",
        ),
        ({"sampler": DDPM("learned_range"), "loss": Hybrid("learned")}, "variance as 'range'"),
        (
            {
                "schedule": CosineLogSNR(),
                "time_input": "scaled_t",
                "sampler": DDPM("learned_range"),
                "loss": Hybrid(),
            },
            "discrete",
        ),
        ({"dtype": "float16"}, "'float16'"),
        ({"sampler": DDIM(eta=2.0)}, "eta must lie in"),
        ({"guidance": ClassifierFree(float("nan"))}, "scale must be a finite number"),
        ({"threshold": StaticThreshold(-1.0)}, "limit must be positive"),
        ({"label_dropout": 1.0}, "dropout rate"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_the_system_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SYSTEM, **changes).build()


@pytest.mark.slow
def test_noise_has_the_size_of_the_level_where_the_grid_starts():
    """EDM's x_T ~ N(0, sigma²) at the grid's own first sigma, the largest x that is ever seen."""
    system = DDPMSystem(
        image_size=4,
        channels=1,
        network=MLPConfig(width=16, depth=1),
        schedule=EDM(),
        parameterization=V(),
        time_input="edm",
        threshold=Unguided(),
        steps=Steps("karras", num_steps=3, max_steps=3),
    )
    stage = system.build().stages["base"]
    params = jax.tree.map(jnp.zeros_like, params_of(stage))
    keys, seen = image_keys(0, np.arange(64)), []

    def spy(denoise, uncond):
        def wrapped(x, level, cond):
            jax.debug.callback(lambda value: seen.append(float(value)), jnp.std(x))
            return denoise(x, level, cond)

        return wrapped

    for sigma_max in (80.0, 20.0):
        grid = karras(EDM(), 3, max_steps=3, sigma_max=sigma_max)
        seen.clear()
        stage.sample(params, {}, keys, guide=jax.tree_util.Partial(spy), grid=grid)
        jax.effects_barrier()
        assert max(seen) == pytest.approx(sigma_max, rel=0.1)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 4, 4, 1\], got \[4, 8, 8, 1\]"):
        STAGE.loss(PARAMS, {"image": jnp.zeros((4, 8, 8, 1)), **LABELS}, KEYS)


def hybrid_system(**changes):
    """A system with learned variance."""
    return replace(
        DDPMSystem(
            image_size=4,
            channels=1,
            network=MLPConfig(width=16, depth=1, out_channels=2),
            loss=Hybrid(),
            sampler=DDPM("learned_range"),
            steps=Steps(num_steps=3, max_steps=3),
        ),
        **changes,
    )


def test_a_learned_variance_needs_twice_the_channels():
    stage = hybrid_system(network=MLPConfig(width=16, depth=1)).build().stages["base"]
    params = jax.eval_shape(stage.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"\(4, 4, 4, 1\)"):
        jax.eval_shape(stage.loss, params, {"image": jnp.zeros((4, 4, 4, 1))}, KEYS)


@pytest.mark.slow
def test_the_learned_variance_reaches_the_sampler():
    """Its channels change the image; without noise in them the steps are the same."""
    system = hybrid_system()
    stage, params = system.build().stages["base"], params_of(system.build().stages["base"])
    louder = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.at[..., 1::2].add(1.0) if "dense_out" in str(path) else leaf,
        params,
    )
    one, other = (stage.sample(p, {}, KEYS) for p in (params, louder))
    assert np.isfinite(one).all() and np.abs(one - other).max() > 1e-3
    with_fixed = [stage.sample(p, {}, KEYS, sampler=DDPM("small")) for p in (params, louder)]
    np.testing.assert_array_equal(*with_fixed)


@pytest.mark.slow
def test_loss_aware_times_train_with_a_memory():
    stage = hybrid_system(loss=VLB(), times=LossAware(history=2)).build().stages["base"]
    tx = Optimizer().build()
    state = TrainState.create(stage.init(jax.random.key(0)), tx, loss=stage.loss)
    step = jax.jit(make_train_step(stage.loss, tx, ema=EMA(0.9)))
    batch = {"image": jnp.zeros((4, 4, 4, 1))}
    state, metrics = step(state, batch, KEYS)
    assert int(state.loss_state.count.sum()) == 4 and np.isfinite(metrics["vb"])


@pytest.mark.slow
def test_flow_matching_samples_from_the_end_without_signal():
    system = DDPMSystem(
        image_size=4,
        channels=1,
        network=MLPConfig(width=16, depth=1),
        schedule=FlowMatching(shift=3.0),
        parameterization=FlowVelocity(),
        time_input="scaled_t",
        sampler=DDIM(),
        steps=Steps(num_steps=3, max_steps=3),
    )
    stage = system.build().stages["base"]
    images = stage.sample(params_of(stage), {}, KEYS)
    assert np.isfinite(images).all()
