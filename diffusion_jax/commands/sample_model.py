"""sample --model: images of a released pipeline, as PNG files that can be drawn again."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

SETTINGS = "diffusion_jax"
_LAYOUT = ("boxes", "phrases", "images", "inpaint")
# Options whose value is the path of a picture -> the word of the call.
_PICTURES = {"image": "image", "mask": "mask_image"}


@dataclass(frozen=True)
class SampleModel:
    """Draws images with a released pipeline.

    Every image is a PNG that holds all settings; --from-image FILE.png draws it again.

    Attributes:
      model: folder or hub id of a pipeline, Stable Diffusion for example.
      prompt: texts; of each, num_images are drawn.
      negative_prompt: one text, or one for each prompt.
      image: picture to start from, to inpaint or to enlarge.
      mask: picture that is white where the image is to be drawn anew.
      layout: JSON file with "boxes", a list of [left, top, right, bottom] in [0, 1], and "phrases"
        or "images", a text or the path of a picture for each box; for GLIGEN.
      labels: classes to draw; for DiT.
      num_images: images of each prompt, or all, where there is no prompt.
      num_steps, scale, strength, height, width, eta, sampler, spacing: words of the call; what the
        pipeline's class has where not given.
      word: further words of the call as NAME=JSON, prior_num_inference_steps=10.
      seed: image i is a function of seed and i; drawn afresh, and written down, if not given.
      dtype: of parameters and activations, "bfloat16" on accelerators.
      revision, variant: of the weights, see `from_pretrained`.
      lora: file or folder of a LoRA for the pipeline, see `load_lora`.
      lora_scale: how much of it, 1 for as it was trained.
      offload: keep the parameters in the host's memory but for those in use.
      out: folder for the images.
      from_image: PNG of this command, from which all options are read but dtype, offload and out.
    """

    model: str | None = None
    prompt: tuple[str, ...] = ()
    negative_prompt: tuple[str, ...] = ()
    image: Path | None = None
    mask: Path | None = None
    layout: Path | None = None
    labels: tuple[int, ...] = ()
    num_images: int = 1
    num_steps: int | None = None
    scale: float | None = None
    strength: float | None = None
    height: int | None = None
    width: int | None = None
    eta: float | None = None
    sampler: str | None = None
    spacing: str | None = None
    word: tuple[str, ...] = ()
    seed: int | None = None
    dtype: str | None = None
    revision: str | None = None
    variant: str | None = None
    lora: Path | None = None
    lora_scale: float = 1.0
    offload: bool = False
    out: Path = Path("runs/samples")
    from_image: Path | None = None

    def run(self) -> int:
        if self.from_image is not None:
            redraw(self.from_image, out=self.out, dtype=self.dtype, offload=self.offload)
            return 0
        if self.model is None:
            raise ValueError("sample needs --model FOLDER_OR_ID, or --from-image FILE.png")
        draw(self)
        return 0


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _opened(path: Path) -> Any:
    from PIL import Image

    from diffusion_jax.data.decode import decode_image

    return Image.fromarray(decode_image(str(path), name=str(path)))


def _layout(path: Path) -> dict[str, Any]:
    """The words that a layout file stands for, pictures by their paths.

    Raises:
      ValueError: if the file is no layout.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or "boxes" not in content or set(content) - set(_LAYOUT):
        raise ValueError(f"{path}: expected an object with boxes and some of {_LAYOUT[1:]}")
    words = {"gligen_boxes": content["boxes"]}
    if "phrases" in content:
        words["gligen_phrases"] = content["phrases"]
    if "images" in content:
        words["gligen_images"] = [str(path.parent / each) for each in content["images"]]
    if "inpaint" in content:
        words["gligen_inpaint_image"] = str(path.parent / content["inpaint"])
    return words


def _words(options: SampleModel) -> dict[str, Any]:
    """The call of the options; pictures by their paths."""
    words: dict[str, Any] = {
        "num_inference_steps": options.num_steps,
        "guidance_scale": options.scale,
        "strength": options.strength,
        "height": options.height,
        "width": options.width,
        "eta": options.eta,
        "sampler": options.sampler,
        "spacing": options.spacing,
        "prompt": list(options.prompt) or None,
        "negative_prompt": list(options.negative_prompt) or None,
        "class_labels": list(options.labels) or None,
        **{
            word: None if getattr(options, name) is None else str(getattr(options, name))
            for name, word in _PICTURES.items()
        },
    }
    if options.layout is not None:
        words |= _layout(options.layout)
    for each in options.word:
        name, separator, value = each.partition("=")
        if not separator:
            raise ValueError(f"--word must be NAME=JSON, got {each!r}")
        try:
            words[name] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"--word {name}: not JSON ({error}); quote texts twice") from error
    return {name: value for name, value in words.items() if value is not None}


PICTURE_WORDS = (*_PICTURES.values(), "gligen_images", "gligen_inpaint_image")


def _with_pictures(words: Mapping[str, Any]) -> dict[str, Any]:
    """The words with pictures opened."""
    opened = dict(words)
    for name in PICTURE_WORDS:
        if isinstance(opened.get(name), str):
            opened[name] = _opened(Path(opened[name]))
        elif name in opened:
            opened[name] = [_opened(Path(each)) for each in opened[name]]
    return opened


def _digests(words: Mapping[str, Any], lora: Path | None) -> dict[str, str]:
    """Of every file that images depend on beside the model."""
    paths = []
    if lora is not None:
        paths += [str(each) for each in ([lora] if lora.is_file() else sorted(lora.glob("*.*")))]
    for name in PICTURE_WORDS:
        value = words.get(name, [])
        paths += [value] if isinstance(value, str) else value
    return {path: _digest(Path(path)) for path in paths}


class Bar:
    """A progress bar of steps; compiling is told apart, and timed."""

    def __init__(self):
        self.compiling = 0.0
        self.drawing = 0.0
        self._bar: Any = None
        self._began = 0.0

    def __call__(self, phase: str, done: int | None, total: int) -> None:
        """See `pretrained.calls.Progress`."""
        if done is None:
            self._began = time.perf_counter()
            self._bar = tqdm(total=total, desc=f"{phase}: compiling", unit="step")
        elif done == 0:
            seconds = time.perf_counter() - self._began
            self.compiling += seconds
            self._began += seconds
            self._bar.set_description(f"{phase}: compiled in {seconds:.1f} s")
            self._bar.unpause()
        else:
            self._bar.update(done - self._bar.n)
            if done == total:
                self.drawing += time.perf_counter() - self._began
                self._bar.close()


def _load(model: str, settings: Mapping[str, Any], dtype: str | None, offload: bool) -> Any:
    from diffusion_jax.pretrained import Pipeline, from_pretrained, with_lora

    found = from_pretrained(
        model, revision=settings["revision"], variant=settings["variant"], dtype=dtype
    )
    if not isinstance(found, Pipeline):
        raise ValueError(
            f"{model} holds a {type(found).__name__}, and --model wants a pipeline; the directory "
            "of a training run is sampled by diffusion-jax sample DIR"
        )
    if settings["lora"] is not None:
        found = with_lora(found, settings["lora"], settings["lora_scale"])
    return found.on_host() if offload else found


def _count_word(pipeline: Any, words: dict[str, Any], num_images: int) -> dict[str, Any]:
    """The words with the number of images by the name that the task has for it."""
    from diffusion_jax.pretrained.calls import task_of

    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    known = task_of(pipeline.class_name, words).words
    if "num_images_per_prompt" in known:
        return {**words, "num_images_per_prompt": num_images}
    if "batch_size" in known:
        return {**words, "batch_size": num_images}
    if "class_labels" in words:
        labels = [label for label in words["class_labels"] for _ in range(num_images)]
        return {**words, "class_labels": labels}
    if num_images != 1:
        raise ValueError("this pipeline draws one image of each picture; leave num_images at 1")
    return words


def draw(options: SampleModel) -> list[Path]:
    """Draws what the options say, one PNG an image, and a grid of all.

    Returns:
      the files written.

    Raises:
      ValueError: if an option is out of range or the pipeline does not have it.
    """
    words = _words(options)
    settings: dict[str, Any] = {
        "model": options.model,
        "revision": options.revision,
        "variant": options.variant,
        "lora": None if options.lora is None else str(options.lora),
        "lora_scale": options.lora_scale,
    }
    pipeline = _load(str(options.model), settings, options.dtype, options.offload)
    call = _count_word(pipeline, _with_pictures(words), options.num_images)
    bar = Bar()
    drawn = pipeline(**call, seed=options.seed, output_type="np", progress=bar)
    settings |= {"seed": drawn.seed, "task": drawn.task, "dtype": options.dtype}
    settings |= {
        "words": words,
        "files": _digests(words, options.lora),
        "num_images": options.num_images,
    }
    files = _written(drawn.images, settings, range(len(drawn.images)), options.out)
    print(
        f"{len(drawn.images)} images and grid.png are in {options.out}: seed {drawn.seed}, "
        f"{bar.drawing / len(drawn.images):.2f} s an image for all steps, after compiling in "
        f"{bar.compiling:.1f} s"
    )
    return files


def redraw(path: Path, *, out: Path, dtype: str | None = None, offload: bool = False) -> list[Path]:
    """Draws an image again by the settings in its PNG.

    All images of its call are drawn, and the one with its number is kept.

    Raises:
      ValueError: if the file has no settings of `draw`, or a picture that it was drawn from is
        not what it was.
    """
    from PIL import Image

    with Image.open(path) as picture:
        text = getattr(picture, "text", {}).get(SETTINGS)
    settings = json.loads(text) if text else {}
    if "words" not in settings or "model" not in settings or "index" not in settings:
        raise ValueError(f"{path} holds no settings of diffusion-jax sample --model")
    for name, digest in settings["files"].items():
        if not Path(name).is_file() or _digest(Path(name)) != digest:
            raise ValueError(f"{name}, which {path} was drawn from, is missing or was changed")
    dtype = settings["dtype"] if dtype is None else dtype
    pipeline = _load(settings["model"], settings, dtype, offload)
    words = _with_pictures(settings["words"])
    call = _count_word(pipeline, words, settings["num_images"])
    drawn = pipeline(**call, seed=settings["seed"], output_type="np", progress=Bar())
    index = settings["index"]
    images = np.asarray(drawn.images)[index : index + 1]
    settings = {**settings, "dtype": dtype}
    files = _written(images, settings, [index], out)
    print(f"image {index} of seed {settings['seed']} is in {out}")
    return files


def _written(
    images: np.ndarray, settings: Mapping[str, Any], indices: Sequence[int], out: Path
) -> list[Path]:
    from diffusion_jax.commands.sample import write_png
    from diffusion_jax.data.transforms import image_grid

    out.mkdir(parents=True, exist_ok=True)
    pixels = np.nan_to_num(np.asarray(images) * 255.0).round().astype(np.uint8)
    files = []
    for index, image in zip(indices, pixels, strict=True):
        files.append(out / f"{index:05d}.png")
        write_png(files[-1], image, {**settings, "index": index})
    boxes = settings["words"].get("gligen_boxes")
    shown = np.stack([_boxed(image, boxes) for image in pixels]) if boxes else pixels
    files.append(out / "grid.png")
    write_png(files[-1], image_grid(shown, min(8, len(shown))), dict(settings))
    return files


def _boxed(image: np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """An image with its boxes drawn in."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(image)
    pen, (width, height) = ImageDraw.Draw(picture), picture.size
    for i, (left, top, right, bottom) in enumerate(boxes):
        color = ("red", "lime", "blue", "orange", "cyan", "magenta")[i % 6]
        pen.rectangle(
            (left * (width - 1), top * (height - 1), right * (width - 1), bottom * (height - 1)),
            outline=color,
            width=max(1, width // 256),
        )
    return np.asarray(picture)
