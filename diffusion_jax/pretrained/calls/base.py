"""What every call of a pipeline has in common: words, keys, controls, and running the phases."""

import dataclasses
import difflib
import functools
import math
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.arrays import as_arrays, image_keys
from diffusion_jax.core.grid import Grid
from diffusion_jax.core.parameterization import V
from diffusion_jax.core.timesteps import Steps
from diffusion_jax.core.types import Array, Batch, Key
from diffusion_jax.data.tokenizers import Tokenizer, check_prompts
from diffusion_jax.guidance import ClassifierFree, Guide, Unguided
from diffusion_jax.models.tiny_autoencoder import AutoencoderTinyConfig
from diffusion_jax.pretrained.schedulers import CLASSES, Scheduler, from_config, to_config
from diffusion_jax.pretrained.schedulers.table_steps import PNDMSteps
from diffusion_jax.samplers import SAMPLERS, Sampler, fit_grid
from diffusion_jax.systems.latent_diffusion import DecodeLatents, EncodeImage
from diffusion_jax.systems.phases import (
    Compute,
    Control,
    Draw,
    Phase,
    run_compute,
    run_finish,
    run_start,
    run_steps,
)
from diffusion_jax.training.parallel import replicate, shard_batch

OUTPUT_TYPES = ("pil", "np", "jax", "latent")
# Words of every call, with their defaults.
COMMON: Mapping[str, Any] = {
    "output_type": "pil",
    "seed": None,
    "key": None,
    "callback_on_step_end": None,
    "callback_on_step_end_tensor_inputs": ("latents",),
    "progress": None,
    "mesh": None,
    "vae_slicing": False,
    "vae_tiling": False,
    "attention_slicing": False,
}
# Words of every phase that draws with a scheduler.
STEPS: Mapping[str, Any] = {
    "num_inference_steps": 50,
    "timesteps": None,
    "sigmas": None,
    "eta": 0.0,
    "sampler": None,
    "spacing": "trailing",
}
PROMPTS: Mapping[str, Any] = {
    "prompt": None,
    "negative_prompt": None,
    "prompt_embeds": None,
    "negative_prompt_embeds": None,
    "num_images_per_prompt": 1,
    "on_long_prompt": "warn",
}


class Job(NamedTuple):
    """A call, checked and turned into arrays.

    Attributes:
      phases: what is computed, in this order.
      batch: what the first phases read, arrays [B, ...].
      controls: of every phase that draws.
      num_images: B.
      result: name of the arrays that the last phase gives.
      latents: name of what output_type="latent" asks for; the phases behind it are left out.
    """

    phases: tuple[Phase, ...]
    batch: Batch
    controls: Mapping[str, Control]
    num_images: int
    result: str = "images"
    latents: str = "latents"


class Task(NamedTuple):
    """What a pipeline can be called for.

    Attributes:
      name: "text_to_image".
      words: of the call besides COMMON, with their defaults; diffusers' names.
      needs: words that have to be given, and that choose this task among a pipeline's.
      prepare: (pipeline, words by name) -> Job.
      positional: names of the words that may be given without one, in order.
    """

    name: str
    words: Mapping[str, Any]
    needs: tuple[str, ...]
    prepare: Callable[[Any, Mapping[str, Any]], Job]
    positional: tuple[str, ...] = ("prompt",)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a call gives.

    Attributes:
      images: a list of PIL images, or an array [B, H, W, C]: numpy or JAX in [0, 1], or latents.
      task: what was done.
      seed: that the images were drawn with; None where the caller gave keys.
    """

    images: Any
    task: str
    seed: int | None


class Progress(Protocol):
    """Told of every phase that draws.

    `done` is None before the phase is compiled, 0 when it was, and then counts steps.
    """

    def __call__(self, phase: str, done: int | None, total: int) -> None: ...


def choose(tasks: Sequence[Task], class_name: str, words: Mapping[str, Any]) -> Task:
    """The first task whose needs are given.

    Raises:
      ValueError: if there is none.
    """
    for task in tasks:
        if all(words.get(need) is not None for need in task.needs):
            return task
    choices = "; or ".join(f"{' and '.join(task.needs)} ({task.name})" for task in tasks)
    raise ValueError(f"a {class_name} needs {choices}; got {sorted(words)}")


def named(tasks: Sequence[Task], args: Sequence[Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a call with those that were given by place.

    Raises:
      ValueError: if there are too many, or a word is given twice.
    """
    # Those of the task with most: a picture by place chooses its task.
    names = max((task.positional for task in tasks), key=len)
    if len(args) > len(names):
        raise ValueError(f"only {list(names)} may be given without a name, got {len(args)} values")
    by_place = dict(zip(names, args, strict=False))
    if twice := sorted(by_place.keys() & words.keys()):
        raise ValueError(f"{', '.join(twice)} is given twice")
    return {**by_place, **words}


def completed(task: Task, class_name: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """The words with defaults filled in.

    Raises:
      ValueError: if there is no such word, naming the nearest.
    """
    known = {**COMMON, **task.words}
    unknown = sorted(set(words) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"{task.name} with a {class_name} has no {', '.join(unknown)}; {hint}"
            f"It has {', '.join(sorted(known))}"
        )
    return {**known, **words}


def whole(words: Mapping[str, Any], name: str, least: int = 1) -> int:
    """A whole number of at least `least` among the words.

    Raises:
      ValueError: if it is none.
    """
    value = words[name]
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def number(
    words: Mapping[str, Any], name: str, low: float = -math.inf, high: float = math.inf
) -> float:
    """A finite number within [low, high] among the words; arrays of one number are numbers.

    Raises:
      ValueError: if it is none.
    """
    value = words[name]
    try:
        found = float(np.asarray(value).item())
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool | str) or not math.isfinite(found) or not low <= found <= high:
        raise ValueError(f"{name} must be a number in [{low}, {high}], got {value!r}")
    return found


def keys_of(seed: Any, key: Any, num_images: int) -> tuple[Key, int | None]:
    """One key for each image, and the seed: `image_keys(seed or key, 0 … B - 1)`.

    Args:
      seed: a whole number; drawn afresh where neither is given.
      key: a key, typed or of the old kind, or one key for each image [B].
      num_images: B.

    Raises:
      ValueError: if both are given, or one is no such thing.
    """
    if seed is not None and key is not None:
        raise ValueError("give a seed or a key, not both")
    if key is None:
        seed = secrets.randbits(31) if seed is None else whole({"seed": seed}, "seed", 0)
        return image_keys(seed, np.arange(num_images)), seed
    key = jnp.asarray(key) if not hasattr(key, "dtype") else key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.shape[-1:] != (2,):
            raise ValueError(
                f"key must be of jax.random.key, got {key.dtype} of shape {key.shape}; an int is "
                "a seed"
            )
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
    if key.ndim == 0:
        return image_keys(key, np.arange(num_images)), None
    if key.shape != (num_images,):
        raise ValueError(
            f"key must be one key, or one for each of {num_images} images, got {key.shape}"
        )
    return key, None


class Texts(NamedTuple):
    """Prompts of a call, one for each image.

    Attributes:
      prompts: B texts; None where embeddings were given.
      negatives: B texts; None where embeddings were given, or there is no guidance.
      num_images: B.
    """

    prompts: tuple[str, ...] | None
    negatives: tuple[str, ...] | None
    num_images: int


def texts_of(words: Mapping[str, Any], *, guided: bool) -> Texts:
    """The prompts and negative prompts of a call, repeated for every image.

    Raises:
      ValueError: if prompts and embeddings are both given, or neither, a text is none, or the
        numbers of prompts and negative prompts differ.
    """
    repeats = whole(words, "num_images_per_prompt")
    prompt, embeds = words["prompt"], words["prompt_embeds"]
    if (prompt is None) == (embeds is None):
        raise ValueError("give either a prompt or prompt_embeds")
    prompts = None if prompt is None else check_prompts(prompt)
    count = len(prompts) if prompts is not None else np.shape(embeds)[0]
    negative = words["negative_prompt"]
    if negative is not None and words["negative_prompt_embeds"] is not None:
        raise ValueError("give either a negative_prompt or negative_prompt_embeds")
    negatives = None
    if guided and words["negative_prompt_embeds"] is None:
        negatives = ("",) if negative is None else check_prompts(negative)
        if len(negatives) not in (1, count):
            raise ValueError(
                f"there must be one negative prompt or one for each prompt, got {len(negatives)} "
                f"for {count}"
            )
        negatives = negatives * count if len(negatives) == 1 else negatives
    elif guided and (shape := np.shape(words["negative_prompt_embeds"]))[:1] != (count,):
        raise ValueError(f"negative_prompt_embeds must have shape [{count}, L, D], got {shape}")

    def repeated(texts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if texts is None else tuple(text for text in texts for _ in range(repeats))

    return Texts(repeated(prompts), repeated(negatives), count * repeats)


def embeds_of(words: Mapping[str, Any], name: str) -> Array | None:
    """Embeddings [P, L, D] of a call, repeated for every image.

    Raises:
      ValueError: if they have another rank.
    """
    embeds = words[name]
    if embeds is None:
        return None
    embeds = jnp.asarray(embeds)
    if embeds.ndim != 3:
        raise ValueError(f"{name} must have shape [B, L, D], got {embeds.shape}")
    return jnp.repeat(embeds, whole(words, "num_images_per_prompt"), axis=0)


def ids_of(tokenizer: Tokenizer, texts: Sequence[str], words: Mapping[str, Any]) -> Array:
    """Integers of the texts, [B, L]."""
    return tokenizer(list(texts), on_long_prompt=words["on_long_prompt"]).ids


def guidance_of(words: Mapping[str, Any], scheduler: Scheduler) -> Guide:
    """Classifier-free guidance, or none at a scale of at most 1, as diffusers has it.

    Raises:
      ValueError: if a number is out of range.
    """
    scale = number(words, "guidance_scale")
    rescale = number(words, "guidance_rescale", 0.0, 1.0) if "guidance_rescale" in words else 0.0
    if scale <= 1.0:
        return Unguided()
    if rescale == 0.0:
        return ClassifierFree(scale)
    space = "v" if isinstance(scheduler.parameterization, V) else "eps"
    return ClassifierFree(scale, rescale=rescale, rescale_in=space)


def scheduler_of(scheduler: Scheduler, words: Mapping[str, Any]) -> Scheduler:
    """The scheduler with what diffusers would pass to its `step`.

    Raises:
      ValueError: if it does not take what is given.
    """
    call = {"eta": number(words, "eta", 0.0)}
    if words.get("use_clipped_model_output") is not None:
        call["use_clipped_model_output"] = bool(words["use_clipped_model_output"])
    known = CLASSES[scheduler.class_name].call
    refused = [name for name, value in call.items() if value and name not in known]
    if refused:
        raise ValueError(f"{scheduler.class_name} takes no {' and no '.join(refused)}")
    taken = {name: value for name, value in call.items() if name in known}
    if not taken:
        return scheduler
    return from_config(to_config(scheduler), **{**dict(scheduler.call), **taken})


def control_of(
    scheduler: Scheduler, words: Mapping[str, Any], guide: Guide = Unguided(), **grid: Any
) -> Control:
    """How a phase draws: by the scheduler, or by `sampler` on a grid of this library.

    Args:
      scheduler: of the pipeline.
      words: those of STEPS.
      guide: towards the condition.
      grid: further arguments of `Scheduler.grid`.

    Raises:
      ValueError: if a word is out of range or has no meaning for the scheduler.
    """
    num_steps = whole(words, "num_inference_steps")
    strength = number(words, "strength", 0.0, 1.0) if "strength" in words else 1.0
    # A network that goes on where another one stopped starts there, whatever the strength.
    goes_on = words.get("denoising_start") is not None
    strength = 1.0 if goes_on else strength
    if words["sampler"] is not None:
        return _own_control(scheduler, words, num_steps, strength, guide)
    if words["spacing"] != STEPS["spacing"]:
        raise ValueError("spacing is for a sampler of this library; give one as sampler=")
    scheduler = scheduler_of(scheduler, words)
    times = {name: words[name] for name in ("timesteps", "sigmas") if words[name] is not None}
    if len(times) > 1:
        raise ValueError("give timesteps or sigmas, not both")
    make = scheduler.grid
    if "strength" in words and not goes_on:
        make = functools.partial(scheduler.grid_for_image, strength=strength)
    found, part = _part_of(make(None if times else num_steps, **times, **grid), scheduler, words)
    scale = float(found.level(found.start).alpha) if scheduler.scaled else 1.0
    start_std = scheduler.init_noise_sigma(found) * scale
    return Control(scheduler.sampler, found, start_std, guide, scheduler.threshold, **part)


def _part_of(
    grid: Grid, scheduler: Scheduler, words: Mapping[str, Any]
) -> tuple[Grid, dict[str, Any]]:
    """The grid from the share of the way denoising_start, and how it ends at denoising_end.

    The steps stay those of the whole way: a solver is not told that they end early, and what it
    leaves for another network is in the scheduler's units.
    """
    given = [n for n in ("denoising_start", "denoising_end") if words.get(n) is not None]
    if not given:
        return grid, {}
    shares = {name: number(words, name, 0.0, 1.0) for name in given}
    wrong = [name for name, share in shares.items() if not 0.0 < share < 1.0]
    if wrong:
        raise ValueError(f"{wrong[0]} must lie between 0 and 1, got {shares[wrong[0]]}")
    if len(shares) == 2 and shares["denoising_start"] >= shares["denoising_end"]:
        raise ValueError(f"denoising_start must be smaller than denoising_end, got {shares}")
    if isinstance(scheduler.steps, PNDMSteps) and words["sampler"] is None:
        raise ValueError("PNDM has no halves that two networks could share; give a sampler")
    total = scheduler.schedule.num_timesteps
    if total is None:
        raise ValueError(
            f"{given[0]} is a share of numbered times, and {scheduler.class_name} has none here; "
            "choose another scheduler"
        )
    first, last = int(grid.start), int(grid.stop)
    times = np.asarray(grid.levels.t)[first:last]
    begins = {
        name: first + int(np.sum(times >= round(total - share * total)))
        for name, share in shares.items()
    }
    start, stop = begins.get("denoising_start", first), begins.get("denoising_end", last)
    if start >= stop:
        raise ValueError(f"{shares} leaves none of {last - first} steps; take more of them")
    grid = grid._replace(start=jnp.asarray(start, jnp.int32))
    if "denoising_end" not in shares:
        return grid, {}
    end_scale = scheduler.to_reference(jnp.ones(1), grid.level(stop))[0]
    return grid, {"stop": jnp.asarray(stop, jnp.int32), "end_scale": end_scale}


def _own_control(
    scheduler: Scheduler, words: Mapping[str, Any], num_steps: int, strength: float, guide: Guide
) -> Control:
    sampler: Sampler | str = words["sampler"]
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {sorted(SAMPLERS)}, got {sampler!r}")
        sampler = SAMPLERS[sampler]()
    given = [name for name in ("timesteps", "sigmas") if words[name] is not None]
    if given or number(words, "eta", 0.0):
        raise ValueError(
            f"{', '.join([*given] or ['eta'])} belongs to the scheduler; a sampler has knobs of "
            "its own, and a grid by num_inference_steps and spacing"
        )
    schedule = scheduler.schedule
    grid = Steps(spacing=words["spacing"], num_steps=num_steps).grid(schedule)
    skipped = num_steps - min(int(num_steps * strength), num_steps)
    if skipped == num_steps:
        raise ValueError(f"a strength of {strength} leaves none of {num_steps} steps")
    grid = fit_grid(sampler, grid, schedule).starting_at(skipped)
    grid, part = _part_of(grid, scheduler, words)
    std = schedule.prior_std(grid.level(grid.start))
    return Control(sampler, grid, std, guide, scheduler.threshold, **part)


def _with_memory(phases: Sequence[Phase], words: Mapping[str, Any]) -> tuple[Phase, ...]:
    """The phases with autoencoders that work image by image, and in tiles as diffusers' do.

    With attention_slicing, UNets and autoencoders hold some logits of one head at a time.

    Raises:
      ValueError: if there is no such network, or an autoencoder has no tiles here.
    """
    if words["attention_slicing"]:
        sliced = [_with_sliced_attention(phase) for phase in phases]
        if all(new is old for new, old in zip(sliced, phases, strict=True)):
            raise ValueError("attention_slicing is for pipelines with a UNet or an autoencoder")
        phases = sliced
    slicing, tiling = bool(words["vae_slicing"]), bool(words["vae_tiling"])
    if not slicing and not tiling:
        return tuple(phases)
    coders = [phase for phase in phases if isinstance(phase, DecodeLatents | EncodeImage)]
    if not coders:
        raise ValueError("vae_slicing and vae_tiling are for pipelines with an autoencoder")
    changed: list[Phase] = []
    for phase in phases:
        if isinstance(phase, DecodeLatents | EncodeImage):
            tile = _tile(phase) if tiling else None
            phase = dataclasses.replace(phase, one_by_one=slicing, tile=tile)
        changed.append(phase)
    return tuple(changed)


def _with_sliced_attention(phase: Phase) -> Phase:
    """A phase whose networks tile their attention, where they can."""
    changed = {}
    for field in dataclasses.fields(phase):
        module = getattr(phase, field.name)
        config = getattr(module, "config", None)
        if isinstance(module, nn.Module) and hasattr(config, "attention_implementation"):
            config = dataclasses.replace(config, attention_implementation="tiled")
            changed[field.name] = module.clone(config=config)
    return dataclasses.replace(phase, **changed) if changed else phase


def _tile(phase: DecodeLatents | EncodeImage) -> int:
    """The size that the autoencoder was trained with, in pixels or latents."""
    config: Any = phase.config
    if isinstance(config, AutoencoderTinyConfig):
        raise ValueError("vae_tiling is not for the tiny autoencoder, which needs little memory")
    decodes = isinstance(phase, DecodeLatents)
    return config.sample_size // config.factor if decodes else config.sample_size


def run(pipeline: Any, task: Task, job: Job, words: Mapping[str, Any]) -> Drawn:
    """Runs the phases of a job one after the other.

    The parameters of a phase are brought to the device before it and let go after it, where they
    are not there anyway: a pipeline on the host needs room for its largest component only.

    Raises:
      ValueError: if output_type is unknown, or has no meaning here.
    """
    output = words["output_type"]
    if output not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output!r}")
    keys, seed = keys_of(words["seed"], words["key"], job.num_images)
    phases = _with_memory(job.phases, words)
    wanted = job.latents if output == "latent" else job.result
    batch = dict(job.batch)
    mesh = words["mesh"]
    if mesh is not None:
        # Filled up with repetitions, which are cut off at the end.
        index = np.arange(-(-job.num_images // mesh.size) * mesh.size) % job.num_images
        batch, keys = shard_batch(
            mesh, (jax.tree.map(lambda a: jnp.asarray(a)[index], batch), keys[index])
        )
    for phase in phases:
        if wanted in batch:
            break
        params = {name: pipeline[name].params for name in phase.components}
        if isinstance(phase, Compute):
            if phase.needed(batch):
                params = _placed(params, mesh)
                batch |= run_compute(phase, params, batch, keys)
        else:
            params = _placed(params, mesh)
            control = as_arrays(job.controls[phase.name])
            control = control if mesh is None else replicate(mesh, control)
            x = _draw(pipeline, phase, params, batch, keys, control, words)
            batch[phase.gives] = run_finish(phase, batch, x, control)
        del params
    if wanted not in batch:
        raise ValueError(f"{task.name} has no latents that could be given")
    return Drawn(_output(batch[wanted][: job.num_images], output), task.name, seed)


def _placed(params: Any, mesh: Any) -> Any:
    return jax.device_put(params) if mesh is None else replicate(mesh, params)


def _draw(
    pipeline: Any,
    phase: Draw,
    params: Any,
    batch: Batch,
    keys: Key,
    control: Control,
    words: Mapping[str, Any],
) -> Array:
    callback, progress = words["callback_on_step_end"], words["progress"]
    first, last = int(control.grid.start), int(control.last)
    if progress is not None:
        progress(phase.name, None, last - first)
    state = run_start(phase, params, batch, keys, control)

    def advanced(state: Any, first: int, stop: int) -> Any:
        bounds = np.int32(first), np.int32(stop)
        return run_steps(phase, params, batch, keys, control, state, *bounds)

    if callback is None and progress is None:
        return advanced(state, first, last).x
    # Of no step, so that compiling is told apart.
    state = jax.block_until_ready(advanced(state, first, first))
    if progress is not None:
        progress(phase.name, 0, last - first)
    for step in range(first, last):
        state = jax.block_until_ready(advanced(state, step, step + 1))
        if progress is not None:
            progress(phase.name, step - first + 1, last - first)
        if callback is not None:
            state = _called_back(pipeline, callback, state, step - first, control, words)
    return state.x


def _called_back(
    pipeline: Any,
    callback: Callable,
    state: Any,
    step: int,
    control: Control,
    words: Mapping[str, Any],
) -> Any:
    names = tuple(words["callback_on_step_end_tensor_inputs"])
    if set(names) - {"latents"}:
        raise ValueError(f"callback_on_step_end_tensor_inputs may hold 'latents', got {names}")
    time = float(control.grid.levels.t[int(control.grid.start) + step])
    # A copy, as the next step takes the state over.
    tensors = {name: jnp.copy(state.x) for name in names}
    changed = callback(pipeline, step, time, tensors) or {}
    if set(changed) - {"latents"}:
        raise ValueError(f"a callback may change 'latents' only, got {sorted(changed)}")
    if "latents" not in changed:
        return state
    latents = jnp.asarray(changed["latents"], state.x.dtype)
    if latents.shape != state.x.shape:
        raise ValueError(f"the callback's latents must be {state.x.shape}, got {latents.shape}")
    return state.replace(x=latents)


def _output(images: Array, output: str) -> Any:
    if not bool(jnp.isfinite(images).all()):
        warnings.warn(
            "the images hold numbers that are not finite; with dtype float16 try 'bfloat16' or "
            "'float32'",
            stacklevel=4,
        )
    if output in ("jax", "latent"):
        return images
    images = np.asarray(images)
    if output == "np":
        return images
    from PIL import Image

    pixels = np.nan_to_num(images * 255.0).round().astype(np.uint8)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    return [Image.fromarray(each) for each in pixels]
