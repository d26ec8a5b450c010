"""This library's side."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.cases import PROMPT, STEPS
from benchmarks.speed.worker import Prepared, Spec
from diffusion_jax.core.arrays import as_arrays, fold_in_each, image_keys, per_image_normal
from diffusion_jax.core.condition import Condition
from diffusion_jax.core.denoiser import make_denoiser
from diffusion_jax.core.schedules import Linear
from diffusion_jax.core.types import Key
from diffusion_jax.pretrained import from_config, from_pretrained
from diffusion_jax.samplers import sample
from diffusion_jax.systems import DDPMSystem
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.optimizer import Optimizer
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step, step_keys


def wait_for_device(spec: Spec) -> None:
    """Starts the device's runtime."""
    del spec
    jax.block_until_ready(jnp.zeros(1))


def device_facts(spec: Spec) -> dict[str, Any]:
    """The device and its peak of memory."""
    device = jax.devices()[0]
    if spec.device == "cpu":
        return {"device": device.device_kind}
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {"device": device.device_kind, "device_peak_bytes": peak}


def matmul(spec: Spec) -> float:
    """FLOP/s of the best of ten square matrix products."""
    size = 2048 if spec.device == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(spec.dtype))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        jax.block_until_ready(product(a, a))
        times.append(time.perf_counter() - begin)
    return 2.0 * size**3 / min(times)


def _nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def _nchw(x: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(x, np.float32), -1, 1)


def _size(params: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves(params)
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "parameter_bytes": sum(leaf.nbytes for leaf in leaves),
    }


class _Compiled:
    """A jitted function, compiled on its first call, that tells what compiling took."""

    def __init__(self, function: Any, facts: dict[str, Any]):
        self.function, self.facts, self.compiled = function, facts, None

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            begin = time.perf_counter()
            lowered = self.function.lower(*args)
            traced = time.perf_counter()
            self.compiled = lowered.compile()
            self.facts["trace_s"] = traced - begin
            self.facts["compile_s"] = time.perf_counter() - traced
            analysis = self.compiled.memory_analysis()
            if analysis is not None:
                self.facts["xla_temp_bytes"] = analysis.temp_size_in_bytes
        return self.compiled(*args)


def unet(spec: Spec) -> Prepared:
    """A forward pass of the loaded UNet."""
    loaded = from_pretrained(spec.path("weights"), dtype=spec.dtype)
    module, params = loaded.module, loaded.params["network"]
    facts, given = _size(params), spec.arrays("inputs.npz")

    @jax.jit
    def forward(params, x, t, cond):
        return module.apply({"params": params}, x, t, cond)

    apply = _Compiled(forward, facts)
    x = jnp.asarray(_nhwc(given["sample"]), spec.dtype)
    t = jnp.asarray(given["timestep"])
    cond = Condition(tokens=jnp.asarray(given["tokens"], spec.dtype))
    last: list[jax.Array] = []

    def call() -> None:
        last[:] = [jax.block_until_ready(apply(params, x, t, cond))]

    return Prepared(call, lambda: {"sample": _nchw(last[0])}, spec.expected, facts)


first_call = unet


def _keys(spec: Spec, index: int) -> Key:
    return step_keys(jax.random.key(2), index, spec.batch)


def draw(spec: Spec) -> dict[str, Any]:
    """Writes x0 with the times and the noise that the first training step draws."""
    x0 = spec.arrays("x0.npz")["x0"]
    # As the stage and the averaged loss derive them.
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(fold_in_each(_keys(spec, 0), 2))
    eps = per_image_normal(keys[:, 1], jnp.asarray(_nhwc(x0)))
    t = np.asarray(Linear().sample_t(keys[:, 0]), np.int64)
    np.savez(spec.path("inputs.npz"), x0=x0, t=t, eps=_nchw(eps))
    return {}


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(tree)])


def train(spec: Spec) -> Prepared:
    """Loss, gradient, Adam and moving average of a DDPM."""
    loaded = from_pretrained(spec.path("weights"))
    facts = _size(loaded.params)
    system = DDPMSystem(network=loaded.config.network, dtype=spec.dtype).build()
    stage = system.stages["base"]
    tx = Optimizer(learning_rate=2e-4, clip_norm=None).build()
    params = {"network": loaded.params["network"], "conditioner": {}, "codec": {}}
    state = TrainState.create(params, tx)
    # The state deletes the arrays that it took over in its first step.
    del loaded, params
    step = _Compiled(jax.jit(make_train_step(stage.loss, tx, ema=EMA()), donate_argnums=0), facts)
    images = {"image": jnp.asarray(_nhwc(spec.arrays("inputs.npz")["x0"]))}
    now: dict[str, Any] = {"state": state, "done": 0, "loss": None}
    del state

    def call() -> None:
        state, metrics = step(now.pop("state"), images, _keys(spec, now["done"]))
        jax.block_until_ready(state)
        now.update(state=state, done=now["done"] + 1, loss=metrics["loss"])

    def outputs() -> dict[str, np.ndarray]:
        moments = now["state"].opt_state[0].mu["network"]
        return {"loss": np.asarray(now["loss"]), "gradient": _flat(moments)}

    def expected() -> dict[str, np.ndarray]:
        gradient = from_pretrained(spec.path("gradient")).params["network"]
        return {**spec.expected(), "gradient": _flat(gradient)}

    return Prepared(call, outputs, expected, facts)


def sampler(spec: Spec) -> Prepared:
    """20 steps of DPM-Solver++ 2M around x -> tanh(w x)."""
    scheduler = from_config({"_class_name": "DPMSolverMultistepScheduler"})

    @jax.jit
    def steps(weight, sampler, grid, x, keys):
        def tiny(params, x, t, cond, *, keys=None):
            return jnp.tanh(params * x)

        denoise = make_denoiser(tiny, scheduler.parameterization)(weight)
        return sample(sampler, denoise, grid, x, keys)[0]

    def knobs() -> Any:
        return as_arrays((scheduler.sampler, scheduler.grid(20)))

    weight, x, fixed = jnp.float32(0.7), jnp.asarray(spec.arrays("inputs.npz")["x"]), knobs()
    keys = image_keys(0, range(1))
    last: list[jax.Array] = []

    def call() -> None:
        chosen = knobs() if spec.options["grid_in_call"] else fixed
        last[:] = [jax.block_until_ready(steps(weight, *chosen, x, keys))]

    outputs = lambda: {"x": np.asarray(last[0])}  # noqa: E731
    return Prepared(call, outputs, spec.expected, {})


def text_to_image(spec: Spec) -> Prepared:
    """The loaded pipeline from a prompt to images."""
    pipe = from_pretrained(spec.path("weights"), dtype=spec.dtype)
    facts = _size([pipe[name].params for name in ("unet", "vae", "text_encoder")])
    latents = jnp.asarray(_nhwc(spec.arrays("inputs.npz")["latents"]))
    last: list[jax.Array] = []

    def call() -> None:
        drawn = pipe(
            [PROMPT] * spec.batch,
            num_inference_steps=STEPS,
            guidance_scale=7.5,
            latents=latents,
            output_type="jax",
        )
        last[:] = [jax.block_until_ready(drawn.images)]

    return Prepared(call, lambda: {"images": _nchw(last[0])}, spec.expected, facts)
