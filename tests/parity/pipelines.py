"""Runs reference cases of diffusers' pipelines: the same call of what `from_pretrained` loads."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.arrays import fold_in_each, image_keys
from diffusion_jax.pretrained import Pipeline, from_config, from_pretrained
from diffusion_jax.pretrained.calls import TASKS
from diffusion_jax.pretrained.calls.base import choose, completed
from diffusion_jax.pretrained.components.gligen import grounding_conditioner
from diffusion_jax.samplers.base import _INITIAL_NOISE
from diffusion_jax.systems import gligen, phases
from diffusion_jax.systems.latent_diffusion import Denoise2D
from diffusion_jax.systems.phases import PURPOSES
from tests.noise import drawn_by

SEED = 0
# What the parts of a pipeline are called whose inputs and outputs are recorded.
DENOISERS = ("unet", "transformer", "prior", "decoder", "super_res_first", "super_res_last")
# What the networks of a pipeline are told, as it is called in the recordings.
TOLD: Mapping[str, Mapping[str, str]] = {
    "prior": {
        "tokens": "encoder_hidden_states",
        "vector": "proj_embedding",
        "token_mask": "attention_mask",
    },
    "decoder": {
        "tokens": "encoder_hidden_states",
        "vector": "class_labels",
        "token_mask": "attention_mask",
    },
}
# What a pipeline draws itself, in this order, where it is not the initial noise alone; that of
# the second phase that draws is called initial_1.
DRAWS: Mapping[str, tuple[str, ...]] = {
    "StableDiffusionUpscalePipeline": ("low_res", "initial"),
    "IFSuperResolutionPipeline": ("initial", "low_res"),
    "UnCLIPPipeline": ("initial", "initial_1", "initial_2"),
}
# Which words bring a noise along that a pipeline would draw.
BROUGHT: Mapping[str, tuple[str, ...]] = {
    "initial": ("latents", "prior_latents"),
    "initial_1": ("decoder_latents",),
    "initial_2": ("super_res_latents",),
}
GROUNDED = "StableDiffusionGLIGENPipeline"
# Calls its network with and without boxes, and uses half of what comes out.
CALLED_TWICE = "StableDiffusionGLIGENTextImagePipeline"
# Pipelines that encode the negative prompt before the prompt.
NEGATIVE_FIRST = ("LDMTextToImagePipeline",)
# Pipelines whose condition comes first in a batch of two halves; the others' comes last.
CONDITION_FIRST = ("DiTPipeline",)


def run(case: Mapping[str, Any], folder: Path) -> dict[str, np.ndarray] | None:
    """Outputs of a case by name; None if it is no pipeline that can be called here."""
    if case.get("checkpoint_format") != "diffusers-pipeline" or "call_kwargs" not in case:
        return None
    class_name = case["class"].rpartition(".")[2]
    if class_name not in TASKS:
        return None
    with np.load(folder / case["inputs_file"]) as file:
        inputs = dict(file)
    pipeline = _pipeline(case, folder, class_name)
    words = _words(case, inputs)
    task = choose(TASKS[class_name], class_name, words)
    job = task.prepare(pipeline, completed(task, class_name, words))
    seen: dict[str, list[dict[str, np.ndarray]]] = {}
    with _recorded_noise(case, inputs, job.num_images), _watched(pipeline, seen):
        drawn = pipeline(**words, seed=SEED)
    return _outputs(case, class_name, pipeline, job, seen, np.asarray(drawn.images))


def _pipeline(case: Mapping[str, Any], folder: Path, class_name: str) -> Pipeline:
    found = from_pretrained(folder / case["checkpoint"], ignore_unknown=True)
    assert isinstance(found, Pipeline)
    parts = {name: from_config(config) for name, config in case.get("schedulers", {}).items()}
    return Pipeline(class_name, {**found.parts, **parts}, found.options, found.entries)


def _words(case: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The call's arguments; tensors in our layout, pictures as pictures."""
    from PIL import Image

    def given(name: str, value: Any) -> Any:
        if isinstance(value, Mapping) and "tensor" in value:
            return _nhwc(inputs[name])
        if isinstance(value, Mapping) and "PIL" in value:
            return Image.fromarray(inputs[name])
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return [given(f"{name}.{i}", each) for i, each in enumerate(value)]
        return value

    return {name: given(name, value) for name, value in case["call_kwargs"].items()}


def _nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def _nchw(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -1, 1) if x.ndim == 4 else x


# What the programs that were compiled under `_recorded_noise` look up.
_drawn: dict[bytes, np.ndarray] = {}
_queue: list[np.ndarray] = []
_put_in: list[np.ndarray] = []


def _key_bytes(keys: Any) -> bytes:
    return np.asarray(jax.random.key_data(keys)).tobytes()


def _look_up(queue: list[np.ndarray], data: Any, like: Any) -> np.ndarray:
    """The recorded noise of known keys; of others, that of a queue in its order."""
    key, shape = np.asarray(data).tobytes(), np.shape(like)
    if key not in _drawn:
        # DiT's pipeline draws for both halves of a guided batch, and uses the first.
        fits = queue and queue[0].shape[1:] == shape[1:]
        _drawn[key] = queue.pop(0)[: shape[0]] if fits else np.zeros(shape, np.float32)
    # GLIGEN's pipeline puts one noise into all images.
    return np.broadcast_to(np.asarray(_drawn[key], np.float32), shape)


def _drawing_from(queue: list[np.ndarray]) -> Callable[[Any, Any], Any]:
    def draw(keys: Any, x: Any) -> Any:
        shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        look_up = functools.partial(_look_up, queue)
        return jax.pure_callback(look_up, shape, jax.random.key_data(keys), x)

    return draw


def _keys_of(purpose: str, keys: Any) -> Any:
    """What a noise is drawn from."""
    name, _, phase = purpose.partition("_")
    if name == "initial":
        keys = fold_in_each(keys, 0xFFFFFF00 + int(phase)) if phase else keys
        return fold_in_each(keys, _INITIAL_NOISE)
    return fold_in_each(keys, PURPOSES[purpose])


@contextlib.contextmanager
def _recorded_noise(
    case: Mapping[str, Any], inputs: Mapping[str, np.ndarray], num_images: int
) -> Iterator[None]:
    """Draws what the peer drew, wherever that was."""
    keys = image_keys(SEED, np.arange(num_images))
    class_name = case["class"].rpartition(".")[2]
    draws = DRAWS.get(class_name, ("initial",))
    brought = {each for each in draws if set(BROUGHT.get(each, ())) & set(case["call_kwargs"])}
    others = iter([each for each in draws if each not in brought])
    posteriors = iter(("posterior", "known_posterior"))
    if "mask_image" in case["call_kwargs"] and _is_masked_first(case):
        posteriors = iter(("known_posterior",))
    for kept in (_drawn, _queue, _put_in):
        kept.clear()
    # GLIGEN's pipeline draws again with fewer channels, and uses that.
    redrawn = class_name in (GROUNDED, CALLED_TWICE) and "torch.randn_like" in case["noise_sites"]
    redrawn = redrawn and "latents" not in case["call_kwargs"]
    for i, site in enumerate(case["noise_sites"]):
        noise = _nhwc(inputs[f"noise_{i:03d}"])
        if site == "torch.randn_like" and not redrawn:
            _put_in.append(noise)
        elif site == "torch.randn_like":
            _drawn[_key_bytes(_keys_of("initial", keys))] = noise
            redrawn = False
        elif site.startswith(("scheduling", "torch")):
            _queue.append(noise)
        elif site == "vae" or not redrawn:
            purpose = next(posteriors if site == "vae" else others)
            _drawn[_key_bytes(_keys_of(purpose, keys))] = noise

    compiled = (phases.run_compute, phases.run_start, phases.run_steps)
    for function in compiled:
        function.clear_cache()
    try:
        put_in = mock.patch.object(gligen, "per_image_normal", _drawing_from(_put_in))
        with drawn_by(_drawing_from(_queue)), put_in:
            yield
    finally:
        for function in compiled:
            function.clear_cache()


def _is_masked_first(case: Mapping[str, Any]) -> bool:
    """Whether the only picture that is encoded is the one behind the mask."""
    return case["noise_sites"].count("vae") == 1


@contextlib.contextmanager
def _watched(pipeline: Pipeline, seen: dict[str, list[dict[str, np.ndarray]]]) -> Iterator[None]:
    """Writes down what goes into the networks of a pipeline and comes out of them."""
    # By what their modules are applied with, as two parts may have one configuration.
    owners: dict[int, str] = {}
    steps, condition = phases.steps, Denoise2D.condition
    objects: dict[str, Any] = {}

    def watched_steps(phase, params, *args):
        for name in set(params) & set(DENOISERS):
            leaves = jax.tree.leaves(params[name]["network"])
            owners.update({id(leaf): name for leaf in leaves})
        try:
            return steps(phase, params, *args)
        finally:
            owners.clear()

    def note(name: str, values: Mapping[str, Any]) -> None:
        def write(values):
            seen.setdefault(name, []).append({k: np.asarray(v) for k, v in values.items()})

        jax.debug.callback(write, values, ordered=True)

    def interceptor(next_function, args, kwargs, context):
        out = next_function(*args, **kwargs)
        module = context.module
        if module.name is not None or not hasattr(module, "config"):
            return out
        if context.method_name == "decode":
            note("vae", {"in": args[0]})
        leaves = jax.tree.leaves(module.variables.get("params", {}))
        name = owners.get(id(leaves[0])) if leaves else None
        if name is not None and context.method_name == "__call__":
            x, t, cond = args[:3]
            values = {"in": x, "t": t, "out": out}
            if cond.image is not None:
                values["in"] = jnp.concatenate([x, cond.image], axis=-1)
            for slot, told in TOLD.get(name, {}).items():
                if getattr(cond, slot) is not None:
                    values[told] = getattr(cond, slot)
            if pipeline.class_name != CALLED_TWICE:
                note(name, values)
                return out
            owners.clear()
            for each in (objects["with"], objects["without"]):
                each = jnp.repeat(each, x.shape[0] // each.shape[0], axis=0)
                both = cond.replace(grounding=cond.grounding.replace(objects=each))
                note(name, {**values, "out": module.clone().apply(module.variables, x, t, both)})
            owners.update({id(leaf): name for leaf in leaves})
        return out

    def watched_condition(phase, params, batch, *, null):
        # As the peer's network takes them, before its own projection.
        name = "null_tokens" if null else "tokens"
        if name in batch:
            note(f"{phase.component}.{name}", {"in": batch[name]})
        if pipeline.class_name == CALLED_TWICE:
            boxes, told = grounding_conditioner(phase.config.grounding), params["conditioner"]
            objects["with"] = boxes.apply(told["grounding"], batch, None).grounding.objects
            objects["without"] = boxes.null(told["grounding"], batch).grounding.objects
        return condition(phase, params, batch, null=null)

    patches = (
        mock.patch.object(Denoise2D, "condition", watched_condition),
        mock.patch.object(phases, "steps", watched_steps),
        nn.intercept_methods(interceptor),
    )
    with contextlib.ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def _grounding(case: Mapping[str, Any], job: Any, first: int) -> dict[str, np.ndarray]:
    """What the encoders of boxes are given, cut to the padding of the peer's calls."""
    if "box_ids" not in job.batch:
        return {}
    words = case["call_kwargs"]
    count = len(words["gligen_boxes"])
    ids, mask = (np.asarray(job.batch[n])[0, :count] for n in ("box_ids", "box_ids_mask"))
    if case["class"].endswith(GROUNDED):
        return {f"text_encoder.call{first}.in": ids[:, : mask.sum(1).max()]}
    outputs = {}
    texts = [i for i in range(count) if (words.get("gligen_phrases") or [None] * count)[i]]
    for call, i in enumerate(texts):
        outputs[f"text_encoder.call{first + call}.in"] = ids[i : i + 1, : mask[i].sum()]
    images = [i for i in range(count) if (words.get("gligen_images") or [None] * count)[i]]
    for call, i in enumerate(images):
        pixels = np.asarray(job.batch["box_pixels"])[0, i : i + 1]
        outputs[f"image_encoder.call{call}.in"] = _nchw(pixels)
    return outputs


def _guided(job: Any) -> bool:
    return any(control.guided for control in job.controls.values())


def _outputs(
    case: Mapping[str, Any],
    class_name: str,
    pipeline: Pipeline,
    job: Any,
    seen: Mapping[str, list[dict[str, np.ndarray]]],
    images: np.ndarray,
) -> dict[str, np.ndarray]:
    outputs = {"images": images}
    repeats = case["call_kwargs"].get("num_images_per_prompt", 1)
    for suffix, encoders in (("", ("text_encoder", "bert")), ("_2", ("text_encoder_2",))):
        names = [name for name in (f"ids{suffix}", f"null_ids{suffix}") if name in job.batch]
        names = names[::-1] if class_name in NEGATIVE_FIRST else names
        for i, name in enumerate(names):
            for encoder in encoders:
                outputs[f"{encoder}.call{i}.in"] = np.asarray(job.batch[name][::repeats])
    outputs |= _grounding(case, job, sum(name in job.batch for name in ("ids", "null_ids")))
    if "label" in job.batch and class_name == "DiTPipeline":
        label = np.asarray(job.batch["label"])
        null = np.full_like(label, pipeline["transformer"].config.num_classes)
        both = [label, null] if _guided(job) else [label]
        outputs["transformer.first_class_labels"] = np.concatenate(both)
    if "noise_level" in job.batch:
        level = np.asarray(job.batch["noise_level"])
        outputs["unet.first_class_labels"] = np.tile(level, 2 if _guided(job) else 1)

    def halves(x: np.ndarray) -> np.ndarray:
        # A stage of its own may have no guidance.
        if not _guided(job) or len(x) == job.num_images:
            return x
        pairs = (x[0::2], x[1::2])
        return np.concatenate(pairs if class_name in CONDITION_FIRST else pairs[::-1])

    for name, calls in seen.items():
        if name.endswith("tokens"):
            component, _, which = name.partition(".")
            if which == "tokens":
                sides = [calls[0]["in"]]
                sides += [each["in"] for each in seen.get(f"{component}.null_tokens", [])[:1]]
                sides = sides if class_name in CONDITION_FIRST else sides[::-1]
                outputs[f"{component}.first_encoder_hidden_states"] = np.concatenate(sides)
            continue
        if name == "vae":
            outputs["vae_decode_in"] = _nchw(calls[-1]["in"])
            continue
        for key in calls[0]:
            if key != "t":
                outputs[f"{name}.first_{key}"] = _nchw(halves(calls[0][key]))
        outputs[f"{name}.last_out"] = _nchw(halves(calls[-1]["out"]))
        outputs[f"{name}.timesteps"] = np.asarray([call["t"][0] for call in calls])
    return outputs
