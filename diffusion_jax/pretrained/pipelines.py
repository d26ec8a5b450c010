"""Pipelines as diffusers lays them out: model_index.json and a folder for each part."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from diffusion_jax.data.tokenizer_files import KINDS
from diffusion_jax.data.tokenizers import Tokenizer
from diffusion_jax.data.tokenizers import from_folder as load_tokenizer
from diffusion_jax.io.files import write_text
from diffusion_jax.io.safetensors import WeightsFileError
from diffusion_jax.io.shards import DEFAULT_SHARD_BYTES, has_weights, open_weights, read_json
from diffusion_jax.pretrained.networks import (
    CONFIG,
    Loaded,
    Shardings,
    component_of,
    load_network,
    save_network,
)
from diffusion_jax.pretrained.schedulers import CLASSES, Scheduler, from_config, to_config

if TYPE_CHECKING:
    from diffusion_jax.pretrained.calls import Drawn

INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"

_TOKENIZERS = tuple(name for kind in KINDS.values() for name in kind.classes)
# Parts that check or mark finished pictures, or prepare pictures for encoders; no sampler needs
# them, and a pipeline is the same without.
LEFT_OUT = (
    "StableDiffusionSafetyChecker",
    "IFSafetyChecker",
    "IFWatermarker",
    "CLIPFeatureExtractor",
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPProcessor",
)
# The library of a class whose module diffusers keeps beside one of its pipelines.
_LIBRARIES = {
    "UnCLIPTextProjModel": "unclip",
    "LDMBertModel": "latent_diffusion",
    "CLIPImageProjection": "stable_diffusion",
}


@dataclass(frozen=True)
class Pipeline(Mapping[str, Any]):
    """The parts of a pipeline by name: pipeline["unet"].params, pipeline["scheduler"].

    Attributes:
      class_name: the pipeline in diffusers, "StableDiffusionPipeline".
      parts: name -> `Loaded`, `Scheduler`, `Tokenizer`, or None where the pipeline may have a part
        and this one does not, or where the part is one of `LEFT_OUT`.
      options: what else model_index.json says, "force_zeros_for_empty_prompt".
      entries: the [library, class] of parts as they were read; of other parts, and of those of
        another class now, it follows from the part.
    """

    class_name: str
    parts: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def replace(self, **parts: Any) -> "Pipeline":
        """The pipeline with other parts: replace(scheduler=…).

        Raises:
          ValueError: if it has no part of that name.
        """
        if unknown := sorted(set(parts) - set(self.parts)):
            raise ValueError(f"there are no parts {unknown}, only {sorted(self.parts)}")
        return dataclasses.replace(self, parts={**self.parts, **parts})

    def on_host(self) -> "Pipeline":
        """The pipeline with all parameters in the host's memory.

        A call then brings the parameters of one phase after the other to the device, which needs
        room for the largest of its components instead of all of them.
        """
        networks = {
            name: part._replace(params=jax.device_get(part.params))
            for name, part in self.parts.items()
            if isinstance(part, Loaded)
        }
        return self.replace(**networks)

    def __call__(self, *args: Any, **words: Any) -> "Drawn":
        """Draws images, with the words of diffusers' pipelines.

        pipeline("a photo of a cat", num_inference_steps=30, seed=0).images

        Which words there are depends on the pipeline's class and on what is given, an image or a
        mask for example: `TASKS` lists them. Arrays are NHWC. Beside diffusers' there are:

        Args:
          args: the prompt.
          words: of the task. Of every one:
            seed or key, in place of a generator: image i depends on it and i alone; drawn afresh
            where neither is given, and returned. output_type "pil", "np" or "jax" for images in
            [0, 1], "latent". sampler, a value of `SAMPLERS` or its name, in place of the
            scheduler's, on a grid of `spacing`. mesh, a `training.parallel.make_mesh` over whose
            devices the images are split. progress, a `Progress`.
            callback_on_step_end(pipeline, step, t, {"latents": …}) may return other latents.

        Returns:
          Images, task and seed.

        Raises:
          ValueError: if the class cannot be called, a word is unknown, missing or out of range.
        """
        from diffusion_jax.pretrained.calls import task_of, tasks_of
        from diffusion_jax.pretrained.calls.base import completed, named, run

        words = named(tasks_of(self.class_name), args, words)
        task = task_of(self.class_name, words)
        words = completed(task, self.class_name, words)
        return run(self, task, task.prepare(self, words), words)


def _entries(folder: Path) -> tuple[str, dict[str, tuple[str, str] | None], dict[str, Any]]:
    """(class, parts with their library and class, options) of a model_index.json."""
    path = folder / INDEX
    index = read_json(path)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise WeightsFileError(f"{path} must have a _class_name, got {class_name!r}")
    parts: dict[str, tuple[str, str] | None] = {}
    options = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list):
            options[name] = value
            continue
        if name != Path(name).name or "\\" in name or name in ("", ".", ".."):
            raise WeightsFileError(f"{path} names the part {name!r}, which is no plain name")
        if value == [None, None]:
            parts[name] = None
        elif len(value) == 2 and all(isinstance(each, str) for each in value):
            parts[name] = (value[0], value[1])
        else:
            raise WeightsFileError(
                f"{path}: {name} must be [library, class] or [null, null], got {value!r}"
            )
    return class_name, parts, options


def is_scheduler(class_name: str) -> bool:
    """Whether a class of diffusers is a scheduler, by its name."""
    return class_name in CLASSES or class_name.endswith("Scheduler")


def parts_with_weights(folder: Path) -> list[str]:
    """The names of the networks of a pipeline's folder.

    Raises:
      WeightsFileError: if model_index.json is broken.
      UnknownClassError: if it has a class that is not read here.
    """
    found = []
    for name, entry in _entries(folder)[1].items():
        if entry is None or entry[1] in (*LEFT_OUT, *_TOKENIZERS) or is_scheduler(entry[1]):
            continue
        component_of(entry[1], folder / INDEX)
        found.append(name)
    return found


def part_folder(folder: Path, name: str) -> Path:
    """Where a part of a pipeline lies: in its own folder, in old pipelines beside the index."""
    together = any((folder / config).exists() for config in (CONFIG, SCHEDULER_CONFIG))
    return folder if together and not (folder / name).is_dir() else folder / name


def load_scheduler(folder: Path) -> Scheduler:
    """Reads a folder with scheduler_config.json."""
    path = folder / SCHEDULER_CONFIG
    config = read_json(path)
    try:
        return from_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _variant_of(folder: Path, variant: str | None) -> str | None:
    """The variant of a part; as in diffusers, a part that does not have it gives its plain one."""
    return variant if has_weights(folder, variant=variant) else None


def _shardings_of(shardings: Any, name: str) -> Any:
    if isinstance(shardings, Mapping):
        return shardings.get(name)
    if callable(shardings):
        return lambda path, shape: shardings(f"{name}/{path}", shape)
    return shardings


def load_pipeline(
    folder: Path,
    *,
    dtype: Any = None,
    variant: str | None = None,
    shardings: Shardings | None = None,
    check_finite: bool = False,
    ignore_unknown: bool = False,
    token_length: int | None = None,
) -> Pipeline:
    """Reads a folder with model_index.json; see `from_pretrained`."""
    class_name, entries, options = _entries(folder)
    networks = parts_with_weights(folder)
    variants = {name: _variant_of(part_folder(folder, name), variant) for name in networks}
    if variant is not None and networks and not any(variants.values()):
        open_weights(part_folder(folder, networks[0]), variant=variant)
    if isinstance(shardings, Mapping) and (unknown := sorted(set(shardings) - set(networks))):
        raise ValueError(f"shardings of {unknown}, but the networks are {networks}")
    parts: dict[str, Any] = {}
    for name, entry in entries.items():
        if entry is None or entry[1] in LEFT_OUT:
            parts[name] = None
        elif entry[1] in _TOKENIZERS:
            parts[name] = load_tokenizer(folder, subfolder=name, length=token_length)
        elif is_scheduler(entry[1]):
            parts[name] = load_scheduler(part_folder(folder, name))
        else:
            parts[name] = load_network(
                part_folder(folder, name),
                class_name=entry[1],
                dtype=dtype,
                variant=variants[name],
                shardings=_shardings_of(shardings, name),
                check_finite=check_finite,
                ignore_unknown=ignore_unknown,
            )
    known = {name: entry for name, entry in entries.items() if entry and parts[name] is not None}
    return Pipeline(class_name, parts, options, known)


def _entry(pipeline: Pipeline, name: str) -> list[str | None]:
    part = pipeline[name]
    if part is None:
        return [None, None]
    if isinstance(part, Scheduler):
        return ["diffusers", part.class_name]
    known = pipeline.entries.get(name, (None, None))
    if isinstance(part, Tokenizer):
        classes = KINDS[part.kind].classes
        if not classes:
            raise ValueError(f"a pipeline has no class for the {part.kind} tokenizer {name!r}")
        return list(known) if known[1] in classes else ["transformers", classes[0]]
    if known[1] == part.class_name:
        return list(known)
    config = component_of(part.class_name, name).write(part.config)
    library = "diffusers" if "_class_name" in config else "transformers"
    return [_LIBRARIES.get(part.class_name, library), part.class_name]


def save_pipeline(
    pipeline: Pipeline,
    folder: Path,
    *,
    variant: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes model_index.json and a folder for each part; see `save_pretrained`."""
    if (folder / INDEX).exists():
        raise ValueError(f"{folder} already holds a pipeline; choose another folder")
    for name, part in pipeline.items():
        if not isinstance(part, Loaded | Scheduler | Tokenizer | None):
            raise ValueError(
                f"the part {name!r} must be a Loaded, Scheduler, Tokenizer or None, got "
                f"{type(part).__name__}"
            )
    index = {name: _entry(pipeline, name) for name in pipeline}
    for name, part in pipeline.items():
        if isinstance(part, Loaded):
            save_network(part, folder / name, variant=variant, max_shard_size=max_shard_size)
        elif isinstance(part, Tokenizer):
            part.save(folder / name)
        elif isinstance(part, Scheduler):
            save_scheduler(part, folder / name)
    content = {"_class_name": pipeline.class_name, **pipeline.options, **index}
    write_text(folder / INDEX, json.dumps(content, indent=2, sort_keys=True) + "\n")


def save_scheduler(scheduler: Scheduler, folder: Path) -> None:
    """Writes scheduler_config.json to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(to_config(scheduler), indent=2, sort_keys=True)
    write_text(folder / SCHEDULER_CONFIG, config + "\n")
