"""Losses that learn the variance: the optimal curve is found, and conventions are kept apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.core.condition import Condition
from diffusion_jax.core.parameterization import PARAMETERIZATIONS, Eps
from diffusion_jax.core.schedules import Cosine, CosineLogSNR
from diffusion_jax.losses import hybrid
from diffusion_jax.losses.hybrid import VLB, Hybrid
from diffusion_jax.losses.weights import MinSNR

T, LAMBDA = 100, 0.25
SCHEDULE = Cosine(T)
TIMES = jnp.arange(float(T))
# Products of a data value and a noise with the first two moments of two Gaussians: for whatever
# is quadratic in them, as the bound's terms are, the mean of the four is the expectation.
X0 = np.sqrt(LAMBDA) * np.asarray([1.0, 1.0, -1.0, -1.0], np.float32)
EPS = np.asarray([1.0, -1.0, 1.0, -1.0], np.float32)


def two_numbers(params, x, t, cond, *, keys=None):
    """Two parameters for every time: the slope of eps, and the position of the variance."""
    index = t.astype(jnp.int32)
    slope, position = params["slope"][index][:, None], params["position"][index][:, None]
    return jnp.concatenate([slope * x, jnp.broadcast_to(position, x.shape)], axis=-1)


def initial():
    return {"slope": jnp.zeros(T), "position": jnp.zeros(T)}


def example_loss(loss, network=two_numbers, parameterization=Eps(), schedule=SCHEDULE):
    return loss.per_example(network, schedule, parameterization)


def evaluate(loss, params, t=TIMES, **parts):
    """Loss and metrics, [B] each, of the four values as the dimensions of an example."""
    x0 = jnp.broadcast_to(jnp.asarray(X0), (len(t), 4))
    keys = jax.random.split(jax.random.key(0), (len(t), 2))
    return example_loss(loss, **parts)(params, x0, t, Condition(), keys)


@pytest.fixture
def two_point_noise(monkeypatch):
    monkeypatch.setattr(
        hybrid, "per_image_normal", lambda keys, x: jnp.broadcast_to(jnp.asarray(EPS), x.shape)
    )


def optimal_variances():
    """v*(t) and Var(x_{t-1} | x_t) of N(0, λ) data, from ᾱ in float64."""
    after = SCHEDULE.alphas_cumprod()
    before = np.concatenate([[1.0], after[:-1]])
    beta = 1 - after / before
    with np.errstate(divide="ignore", invalid="ignore"):
        small = (1 - before) / (1 - after) * beta
        of_x0 = LAMBDA * (1 - after) / (after * LAMBDA + 1 - after)
        best = small + (np.sqrt(before) * beta / (1 - after)) ** 2 * of_x0
        return np.log(best / small) / np.log(beta / small), best


def train(loss):
    """The network after training on the exact expectation, all times at once."""
    # A short memory: at the noisy end the first gradients are far larger than all later ones.
    rate = optax.cosine_decay_schedule(0.05, 1200)
    optimizer = optax.adam(rate, b2=0.9, eps=1e-12)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.sum(evaluate(loss, p)[0]))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), length=1200)[0][0]

    return jax.tree.map(np.asarray, run(initial()))


@pytest.mark.slow
def test_the_optimal_curve_of_the_variance_is_learned(two_point_noise):
    """v*(t) of improved DDPM on Gaussian data, and with it the exact eps."""
    curve, _ = optimal_variances()
    np.testing.assert_allclose(
        curve[[1, 5, 20, 50, 90]], [0.997, 0.972, 0.759, 0.393, 0.254], atol=6e-4
    )
    params = train(Hybrid())
    learned, between = (params["position"] + 1) / 2, (curve > 0.05) & (curve < 0.95)
    assert between.sum() > 80
    assert np.abs(learned - curve)[between].mean() < 0.05
    # At the very last time alpha is 5e-4, and float32 does not say where the mean is.
    assert np.abs(learned - curve)[1:-1].max() < 0.01
    level = SCHEDULE(np.arange(float(T)))
    exact = level.sigma / (level.alpha**2 * LAMBDA + level.sigma**2)
    np.testing.assert_allclose(params["slope"], exact, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_log_variance_itself_is_learned_too(two_point_noise):
    """By the bound alone, whose gradient is the mean's too; both are those of the posterior."""
    _, best = optimal_variances()
    params = train(VLB("learned", "steps"))
    # Numbers of this size are a few hundred of Adam's steps away; those on their way do not count.
    np.testing.assert_allclose(params["position"][10:], np.log(best[10:]), rtol=0, atol=0.05)
    level = SCHEDULE(np.arange(float(T)))
    exact = level.sigma / (level.alpha**2 * LAMBDA + level.sigma**2)
    np.testing.assert_allclose(params["slope"][1:], exact[1:], rtol=0, atol=1e-2)


def gradients(loss, *metrics):
    """Of the sum over times of each metric."""

    @jax.jit
    def run(params):
        _, pullback = jax.vjp(lambda p: evaluate(loss, p)[1], params)
        zero = dict.fromkeys(loss_metrics(loss), jnp.zeros(T))
        return [pullback({**zero, name: jnp.ones(T)})[0] for name in metrics]

    return run({"slope": jnp.full(T, 0.3), "position": jnp.full(T, 0.2)})


def loss_metrics(loss):
    return ("mse", "vb") if isinstance(loss, Hybrid) else ("vb",)


def test_the_bound_never_moves_the_mean_of_the_hybrid():
    vb, mse = gradients(Hybrid(), "vb", "mse")
    np.testing.assert_array_equal(vb["slope"], 0.0)
    np.testing.assert_array_equal(mse["position"], 0.0)
    assert np.all(np.abs(vb["position"]) > 0) and np.all(np.abs(mse["slope"]) > 0)
    assert np.all(np.isfinite(vb["position"]))


def test_the_bound_alone_moves_the_mean():
    [vb] = gradients(VLB(), "vb")
    assert np.all(np.abs(vb["slope"]) > 0) and np.all(np.abs(vb["position"]) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("total", [100, 1000, 4000])
def test_the_two_rescalings_of_the_hybrid(total):
    """λ T L_t against 1000 λ L_t: the same at T = 1000, four times as much at 4000."""
    t = jnp.round(jnp.linspace(0.0, total - 1.0, T))
    network = {"network": constant, "schedule": Cosine(total)}
    steps, metrics = evaluate(Hybrid(vlb_weight=0.002), {}, t, **network)
    none, _ = evaluate(Hybrid(vlb_weight=0.002, rescaling="none"), {}, t, **network)
    of_steps, of_none = steps - metrics["mse"], none - metrics["mse"]
    np.testing.assert_allclose(of_steps, 0.002 * total * metrics["vb"], rtol=1e-3)
    np.testing.assert_allclose(of_none, 2.0 * metrics["vb"], rtol=1e-3)
    assert np.all(metrics["vb"] > 0.0)


def constant(params, x, t, cond, *, keys=None):
    return jnp.full(x.shape[:-1] + (2 * x.shape[-1],), 0.5)


def test_the_two_scales_of_the_bound():
    params = initial()
    term, metrics = evaluate(VLB(), params)
    whole, _ = evaluate(VLB(rescaling="steps"), params)
    np.testing.assert_allclose(term, metrics["vb"])
    np.testing.assert_allclose(whole, T * term, rtol=1e-6)


def test_the_weight_is_that_of_the_squared_error_alone():
    params, weight = initial(), MinSNR()
    plain, metrics = evaluate(Hybrid(), params)
    weighted, same = evaluate(Hybrid(weight=weight), params)
    factor = weight(SCHEDULE(TIMES), Eps())
    np.testing.assert_allclose(weighted - plain, (factor - 1) * metrics["mse"], atol=1e-4)
    np.testing.assert_array_equal(same["mse"], metrics["mse"])


@pytest.mark.parametrize("name", ["x0", "v", "score"])
def test_the_bound_is_that_of_x0_whatever_the_network_predicts(name, two_point_noise):
    """The same x̂0 said in another way has the same terms."""
    other = PARAMETERIZATIONS[name]()

    def in_other_words(params, x, t, cond, *, keys=None):
        output = two_numbers(params, x, t, cond)
        level = SCHEDULE(t)
        eps, raw = output[:, :4], output[:, 4:]
        x0 = Eps().to_x0(eps, x, level)
        return jnp.concatenate([other.target(x0, eps, level), raw], axis=-1)

    params = {"slope": jnp.full(T, 0.9), "position": jnp.full(T, 0.1)}
    _, expected = evaluate(Hybrid(), params)
    _, metrics = evaluate(Hybrid(), params, network=in_other_words, parameterization=other)
    # At the noisiest times x0 / alpha has no digits left in float32.
    np.testing.assert_allclose(metrics["vb"][:95], expected["vb"][:95], rtol=1e-3)


def test_fixed_variances_have_a_bound_too(two_point_noise):
    """With half as many channels; the learned ends of the range are the two fixed ones."""
    params = initial()

    def mean_only(params, x, t, cond, *, keys=None):
        return two_numbers(params, x, t, cond)[:, :4]

    for variance, end in (("small", -1.0), ("large", 1.0)):
        fixed = VLB(variance)
        assert fixed.learned_variance is None
        value, _ = evaluate(fixed, params, network=mean_only)
        at_end, _ = evaluate(VLB(), {**params, "position": jnp.full(T, end)})
        # In the last step "large" means log β̃_1, and the range ends at log β_0.
        compared = slice(1 if variance == "large" else 0, None)
        np.testing.assert_allclose(value[compared], at_end[compared], rtol=1e-4)


def test_what_the_network_must_be_told():
    assert Hybrid().learned_variance == VLB().learned_variance == "range"
    assert Hybrid("learned").learned_variance == VLB("learned").learned_variance == "log"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Hybrid("small"), "'learned_range', 'learned'.*'small'"),
        (lambda: VLB("interpolated"), "'interpolated'"),
        (lambda: Hybrid(rescaling="T"), "'steps', 'none'.*'T'"),
        (lambda: Hybrid(vlb_weight=0.0), "positive, got 0.0.*simple"),
        (lambda: VLB(half_bin=0.0), "half_bin.*1/255.*0.0"),
        (lambda: Hybrid(cdf="erf"), "'erf'"),
        (lambda: example_loss(Hybrid(), schedule=CosineLogSNR()), "CosineLogSNR.*discrete"),
        (lambda: example_loss(VLB(), schedule=CosineLogSNR()), "CosineLogSNR.*discrete"),
        (lambda: evaluate(VLB("small"), initial()), r"\(100, 8\).*learned_variance is None"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
