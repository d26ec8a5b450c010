"""What DDPM and improved DDPM must show on real digits, and what must fail beside it.

diffusion-jax proof ddpm

The network learns the distribution and does not copy; its learned variance gives more likelihood
than either fixed one, and better images in few steps. An untrained network, a Gaussian fit of the
pixels and a copy of the training data must be told from it, and so must a network that was
trained without the bound.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.commands import figures
from diffusion_jax.commands.proof import Bench, Claim, Proof, Scores
from diffusion_jax.core.arrays import image_keys
from diffusion_jax.core.schedules import Cosine
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.experiments import improved_ddpm
from diffusion_jax.experiments.proofs.common import real_rows
from diffusion_jax.guidance import Unguided
from diffusion_jax.losses import VLB, LossAware, Simple
from diffusion_jax.losses.vlb import bits_per_dim
from diffusion_jax.samplers import DDIM, DDPM, Sampler

TINY = improved_ddpm.TINY
HALF_BIN = TINY.system.loss.half_bin
FIXED = ("small", "large")
EVERY = ("learned_range", *FIXED)
THIRTY = Steps(num_steps=30)
# As the paper respaces: even, both ends included, so that the last step starts at little noise.
EIGHT = Steps(spacing="linspace", num_steps=8, round_t=True)


def without_variance(experiment):
    """The same experiment with the simple loss, which teaches no variance."""
    network = replace(experiment.system.network, out_channels=1)
    system = replace(experiment.system, network=network, loss=Simple(), sampler=DDPM("large"))
    return replace(experiment, system=system)


SIMPLE = without_variance(TINY)
THOUSAND = replace(TINY, system=replace(TINY.system, schedule=Cosine(num_timesteps=1000)))
BOUND = replace(TINY, system=replace(TINY.system, loss=VLB(half_bin=HALF_BIN), times=LossAware()))


def images_of(
    bench: Bench, arm: str, sampler: Sampler, steps: Steps, count: int | None = None
) -> np.ndarray:
    """Images of an arm, as many as there are training images if count is None."""
    system = bench.experiment(arm).system
    grid = steps.grid(system.schedule)
    params = {"base": bench.params(arm)}
    return bench.draw(system, params, bench.labels(count), sampler=sampler, grid=grid)


def score(bench: Bench, images: np.ndarray) -> Scores:
    """Scores of unlabelled images, and the share of them that the oracle is sure of."""
    scores = bench.score(images, bench.labels(len(images)))
    del scores["accuracy"]
    return {**scores, "confident": np.mean(bench.real.oracle.confidence(images) >= 0.8)}


def ddim_30(arm: str) -> Callable[[Bench], Scores]:
    """Scores with 30 steps of DDIM."""
    return lambda bench: score(bench, images_of(bench, arm, DDIM(), THIRTY))


def ancestral_8(arm: str, variance: str) -> Callable[[Bench], Scores]:
    """Fréchet distance with 8 ancestral steps of a variance."""

    def measure(bench: Bench) -> Scores:
        images = images_of(bench, arm, DDPM(variance), EIGHT)
        return {"frechet_train": score(bench, images)["frechet_train"]}

    return measure


def untrained(bench: Bench) -> Scores:
    """Fréchet distance of a network as it was initialised."""
    stage = TINY.system.build().stages["base"]
    params = {"base": jax.jit(stage.init)(jax.random.key(bench.seed))}
    grid = THIRTY.grid(TINY.system.schedule)
    images = bench.draw(TINY.system, params, bench.labels(), sampler=DDIM(), grid=grid)
    return {"frechet_train": score(bench, images)["frechet_train"]}


def gaussian_fit(bench: Bench) -> Scores:
    """Scores of a Gaussian with the mean and covariance of the training pixels."""
    train = bench.splits["train"]["image"]
    flat = train.reshape(len(train), -1).astype(np.float64)
    rng = np.random.default_rng(bench.seed)
    draws = rng.multivariate_normal(flat.mean(0), np.cov(flat.T), len(flat))
    return score(bench, draws.reshape(train.shape).astype(np.float32))


def replay(bench: Bench) -> Scores:
    """Scores of the training data themselves."""
    return score(bench, bench.splits["train"]["image"])


def bits(bench: Bench, arm: str, variance: str, num_steps: int) -> np.ndarray:
    """The variational bound on every held-out digit, [N] bits per dimension.

    The chain is that of `num_steps` steps; equal digits meet equal noise whatever the variance.
    """
    system = bench.experiment(arm).system
    stage = system.build().stages["base"]
    chain = Steps(num_steps=num_steps).grid(system.schedule)
    images = jnp.asarray(bench.splits["test"]["image"])

    @jax.jit
    def total(params, images, keys):
        # Not clipped: the bound is that of the network's own Gaussians.
        denoise = stage.denoiser(params, {"image": images}, Unguided())
        return bits_per_dim(
            denoise, chain, images, keys=keys, variance=variance, half_bin=HALF_BIN
        ).total

    keys = image_keys(bench.seed, range(len(images)))
    return np.asarray(total(bench.params(arm), images, keys), np.float64)


def saved_bits(
    num_steps: int, arms: tuple[str, ...], of: str = "hybrid"
) -> Callable[[Bench], Scores]:
    """Bits per dimension of the learned variance of an arm, and what it saves from fixed ones.

    A saving is the mean difference digit by digit, less two of its standard errors.
    """

    def measure(bench: Bench) -> Scores:
        learned = bits(bench, of, "learned_range", num_steps)
        scores = {"learned": learned.mean(), "error": learned.std() / np.sqrt(len(learned))}
        for arm in arms:
            for variance in FIXED:
                fixed = bits(bench, arm, variance, num_steps)
                saved = fixed - learned
                scores[f"{arm}_{variance}"] = fixed.mean()
                scores[f"saved_from_{arm}_{variance}"] = saved.mean() - 2 * saved.std() / np.sqrt(
                    len(saved)
                )
        return scores

    return measure


def bound_bits(bench: Bench) -> Scores:
    """Bits per dimension of the network that was trained on the bound alone."""
    return {"T_100": bits(bench, "bound", "learned_range", 100).mean()}


def derive(scores: Scores) -> Scores:
    """The learned variance against the best fixed one, of either network."""
    learned = scores["8 steps, hybrid, learned_range/frechet_train"]
    fixed = {
        (arm, variance): scores[f"8 steps, {arm}, {variance}/frechet_train"]
        for arm in ("hybrid", "simple")
        for variance in FIXED
    }
    return {
        "frechet_8_learned_over_best_fixed": learned / min(fixed.values()),
        "frechet_8_large_over_learned": fixed["hybrid", "large"] / learned,
    }


def draw(bench: Bench, path: Path) -> None:
    """Digits of 30 DDIM steps, of 8 ancestral steps with each variance, and real ones."""
    sheets = {"DDIM 30": images_of(bench, "hybrid", DDIM(), THIRTY, 20)}
    for variance in EVERY:
        sheets[f"8, {variance}"] = images_of(bench, "hybrid", DDPM(variance), EIGHT, 20)
    sheets["real"] = bench.splits["test"]["image"][:20]
    figures.named_sheets(path, sheets, columns=10)


VARIANCES = (
    ("hybrid", "learned_range"),
    *((arm, variance) for arm in ("hybrid", "simple") for variance in FIXED),
)

PROOF = Proof(
    arms={"hybrid": TINY, "simple": SIMPLE},
    rows={
        "real": real_rows,
        "DDIM 30": ddim_30("hybrid"),
        "untrained": untrained,
        "Gaussian": gaussian_fit,
        "replay": replay,
        "bits, T = 100": saved_bits(100, ("hybrid", "simple")),
        **{f"8 steps, {arm}, {v}": ancestral_8(arm, v) for arm, v in VARIANCES},
    },
    derive=derive,
    claims=(
        Claim("DDIM 30/frechet_train", high=0.65),
        Claim("DDIM 30/confident", low=0.9),
        Claim("DDIM 30/nearest_ratio", low=0.7),
        Claim("bits, T = 100/saved_from_hybrid_small", low=0.05),
        Claim("bits, T = 100/saved_from_hybrid_large", low=0.05),
        Claim("bits, T = 100/saved_from_simple_small", low=0.05),
        Claim("frechet_8_learned_over_best_fixed", high=0.8),
        Claim("untrained/frechet_train", low=6.5, control=True),
        Claim("Gaussian/confident", high=0.89, control=True),
        Claim("replay/nearest_ratio", high=0.05, control=True),
        Claim("bits, T = 100/saved_from_simple_large", low=0.05, control=True),
        Claim("frechet_8_large_over_learned", low=2.0, control=True),
    ),
    draw=draw,
    ablations={"bound": BOUND, "hybrid_1000": THOUSAND},
    ablation_rows={
        "bits, T = 1000": saved_bits(1000, ("hybrid_1000",), of="hybrid_1000"),
        **{f"8 steps, hybrid_1000, {v}": ancestral_8("hybrid_1000", v) for v in EVERY},
        "simple, DDIM 30": ddim_30("simple"),
        "bound, DDIM 30": ddim_30("bound"),
        "bound, bits": bound_bits,
    },
)
