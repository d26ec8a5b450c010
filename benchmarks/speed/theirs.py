"""diffusers' side: writes the weights and what is expected of them, and is timed."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.cases import PROMPT, STEPS
from benchmarks.speed.worker import Prepared, Spec

# Stable Diffusion's, for text to image.
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def wait_for_device(spec: Spec) -> None:
    """Starts the device's runtime."""
    torch.zeros(1, device=spec.device)
    _wait(spec)


def _wait(spec: Spec) -> None:
    if spec.device == "cuda":
        torch.cuda.synchronize()


def device_facts(spec: Spec) -> dict[str, Any]:
    """The device, its peak of memory, and the threads of a CPU."""
    if spec.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        return {"device": torch.cuda.get_device_name(), "device_peak_bytes": peak}
    return {"device": "cpu", "threads": torch.get_num_threads()}


def matmul(spec: Spec) -> float:
    """FLOP/s of the best of ten square matrix products."""
    size = 2048 if spec.device == "cpu" else 8192
    a = torch.randn(size, size, device=spec.device, dtype=_dtype(spec))
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        a @ a
        _wait(spec)
        times.append(time.perf_counter() - begin)
    return 2.0 * size**3 / min(times)


def _dtype(spec: Spec) -> torch.dtype:
    return getattr(torch, spec.dtype)


def _on(spec: Spec, value: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.from_numpy(value).to(spec.device, dtype)


def _numpy(value: torch.Tensor) -> np.ndarray:
    return value.detach().float().cpu().numpy()


def _ready(model: Any, spec: Spec) -> Any:
    """A network as diffusers' guide to fast inference has it on a GPU."""
    model = model.to(spec.device)
    if not spec.compiled:
        return model
    if spec.device == "cuda":
        model = model.to(memory_format=torch.channels_last)
    return torch.compile(model, fullgraph=True, mode=spec.compile_mode)


def _size(model: Any) -> dict[str, Any]:
    tensors = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in tensors),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in tensors),
    }


# UNet forward.


def unet(spec: Spec) -> Prepared:
    """A forward pass of UNet2DConditionModel."""
    model = UNet2DConditionModel.from_pretrained(spec.path("weights"), torch_dtype=_dtype(spec))
    size = _size(model)
    model = _ready(model.eval(), spec)
    given = {n: _on(spec, v, _dtype(spec)) for n, v in spec.arrays("inputs.npz").items()}
    last: list[torch.Tensor] = []

    @torch.inference_mode()
    def call() -> None:
        last[:] = [model(given["sample"], given["timestep"], given["tokens"]).sample]
        _wait(spec)

    return Prepared(call, lambda: {"sample": _numpy(last[0])}, spec.expected, size)


first_call = unet


def _write_unet(spec: Spec) -> float:
    torch.manual_seed(0)
    model = UNet2DConditionModel(**spec.options["unet"]).eval()
    model.save_pretrained(spec.path("weights"))
    random, edge = np.random.default_rng(0), model.config.sample_size
    width = model.config.cross_attention_dim
    inputs = {
        "sample": random.standard_normal((spec.batch, 4, edge, edge), np.float32),
        "timestep": np.full(spec.batch, 500.0, np.float32),
        "tokens": random.standard_normal((spec.batch, 77, width), np.float32),
    }
    np.savez(spec.path("inputs.npz"), **inputs)
    arguments = [_on(spec, value) for value in inputs.values()]
    with torch.inference_mode():
        output = model.to(spec.device)(*arguments).sample
    np.savez(spec.path("expected.npz"), sample=_numpy(output))
    return _unet_flops(spec.options["unet"], spec.batch)


def _unet_flops(options: Any, batch: int) -> float:
    edge, width = options["sample_size"], options["cross_attention_dim"]
    shapes = ((batch, 4, edge, edge), (batch,), (batch, 77, width))
    return _flops(lambda: UNet2DConditionModel(**options), *shapes)


def _flops(
    build: Callable[[], Any], *shapes: tuple[int, ...], method: str = "forward", train: bool = False
) -> float:
    """Multiplications and additions of matrix products and convolutions, counted without data."""
    with torch.device("meta"), torch.set_grad_enabled(train):
        model = build()
        arguments = [torch.zeros(shape) for shape in shapes]
        with FlopCounterMode(display=False) as counter:
            output = getattr(model, method)(*arguments)
            if train:
                output.sample.sum().backward()
    return float(counter.get_total_flops())


# Training step.


class _Training:
    """The steps of diffusers' examples/unconditional_image_generation, without data loading."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.model = UNet2DModel.from_pretrained(spec.path("weights")).to(spec.device).train()
        self.size = _size(self.model)
        self.network = _ready(self.model, spec)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=2e-4)
        self.ema = EMAModel(self.model.parameters(), foreach=True)
        self.scheduler = diffusers.DDPMScheduler()
        self.first = {n: _on(spec, v) for n, v in spec.arrays("inputs.npz").items()}
        self.losses: list[torch.Tensor] = []

    def step(self) -> None:
        spec, x0 = self.spec, self.first["x0"]
        if self.losses:
            eps = torch.randn_like(x0)
            t = torch.randint(0, 1000, (spec.batch,), device=spec.device)
        else:
            eps, t = self.first["eps"], self.first["t"]
        x = self.scheduler.add_noise(x0, eps, t)
        half = spec.dtype != "float32"
        with torch.autocast(spec.device, _dtype(spec), enabled=half):
            predicted = self.network(x, t).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), eps)
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        self.ema.step(self.model.parameters())
        self.losses[:] = [loss.detach()]
        _wait(spec)

    def outputs(self) -> dict[str, np.ndarray]:
        """The loss and, in the moments of Adam, the gradient of the first step."""
        moments = [_numpy(self.adam.state[p]["exp_avg"]).ravel() for p in self.model.parameters()]
        return {"loss": _numpy(self.losses[0]), "gradient": np.concatenate(moments)}


def train(spec: Spec) -> Prepared:
    """Loss, gradient, Adam and moving average of a DDPM."""
    training = _Training(spec)

    def expected() -> dict[str, np.ndarray]:
        gradient = UNet2DModel.from_pretrained(spec.path("gradient")).parameters()
        flat = np.concatenate([_numpy(each).ravel() for each in gradient])
        return {**spec.expected(), "gradient": flat}

    return Prepared(training.step, training.outputs, expected, training.size)


def _write_train(spec: Spec) -> float:
    torch.manual_seed(0)
    UNet2DModel(**spec.options["unet"]).save_pretrained(spec.path("weights"))
    edge = spec.options["unet"]["sample_size"]
    x0 = np.random.default_rng(0).uniform(-1.0, 1.0, (spec.batch, 3, edge, edge))
    np.savez(spec.path("x0.npz"), x0=x0.astype(np.float32))
    shapes = ((spec.batch, 3, edge, edge), (spec.batch,))
    return _flops(lambda: UNet2DModel(**spec.options["unet"]), *shapes, train=True)


def expect(spec: Spec) -> dict[str, Any]:
    """Writes the loss and the gradient of a step with the noise that was drawn by `ours.draw`."""
    training = _Training(spec._replace(dtype="float32"))
    training.step()
    np.savez(spec.path("expected.npz"), loss=_numpy(training.losses[0]))
    for parameter in training.model.parameters():
        parameter.data.copy_(training.adam.state[parameter]["exp_avg"])
    training.model.save_pretrained(spec.path("gradient"))
    return {}


# Sampler.


def sampler(spec: Spec) -> Prepared:
    """20 steps of DPM-Solver++ 2M around x -> tanh(w x)."""
    scheduler = DPMSolverMultistepScheduler()
    weight = torch.tensor(0.7, device=spec.device)
    x_T = _on(spec, spec.arrays("inputs.npz")["x"])
    last: list[torch.Tensor] = []

    def levels() -> None:
        scheduler.set_timesteps(20, device=spec.device)

    @torch.inference_mode()
    def call() -> None:
        if spec.options["grid_in_call"]:
            levels()
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(weight * x), t, x).prev_sample
        last[:] = [x]
        _wait(spec)

    before = (lambda: None) if spec.options["grid_in_call"] else levels
    return Prepared(call, lambda: {"x": _numpy(last[0])}, spec.expected, {}, before)


def _write_sampler(spec: Spec) -> float:
    x = np.random.default_rng(0).standard_normal((1, 4, 64, 64), np.float32)
    np.savez(spec.path("inputs.npz"), x=x)
    prepared = sampler(spec)
    prepared.before()
    prepared.call()
    np.savez(spec.path("expected.npz"), **prepared.outputs())
    return 0.0


# Text to image.


def text_to_image(spec: Spec) -> Prepared:
    """StableDiffusionPipeline from a prompt to images."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        spec.path("weights"), torch_dtype=_dtype(spec)
    ).to(spec.device)
    pipe.set_progress_bar_config(disable=True)
    networks = (pipe.unet, pipe.vae, pipe.text_encoder)
    sizes = [_size(network) for network in networks]
    size = {key: sum(each[key] for each in sizes) for key in sizes[0]}
    if spec.compiled:
        pipe.unet = _ready(pipe.unet, spec)
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, mode=spec.compile_mode)
    latents = _on(spec, spec.arrays("inputs.npz")["latents"], _dtype(spec))
    call = functools.partial(
        pipe,
        [PROMPT] * spec.batch,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        latents=latents,
        output_type="pt",
    )
    last: list[torch.Tensor] = []

    def run() -> None:
        last[:] = [call().images]
        _wait(spec)

    return Prepared(run, lambda: {"images": _numpy(last[0])}, spec.expected, size)


def _write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer with a vocabulary of single letters: no merges need to be downloaded."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_text_to_image(spec: Spec) -> float:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    options = spec.options["unet"]
    layers = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = {**spec.options["vae"], **layers, "latent_channels": 4}
    _write_tokenizer(spec.path("tokenizer"))
    tokenizer = CLIPTokenizer.from_pretrained(spec.path("tokenizer"))
    text = CLIPTextConfig(
        hidden_size=options["cross_attention_dim"],
        intermediate_size=4 * options["cross_attention_dim"],
        num_hidden_layers=spec.options.get("text_layers", 12),
        num_attention_heads=12,
        projection_dim=768,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=AutoencoderKL(**vae),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**options),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(spec.path("weights"))
    edge = options["sample_size"]
    latents = np.random.default_rng(0).standard_normal((spec.batch, 4, edge, edge), np.float32)
    np.savez(spec.path("inputs.npz"), latents=latents)
    prepared = text_to_image(spec._replace(dtype="float32"))
    prepared.call()
    np.savez(spec.path("expected.npz"), **prepared.outputs())
    decoding = _flops(lambda: AutoencoderKL(**vae), (spec.batch, 4, edge, edge), method="decode")
    # Guidance calls the network with both conditions; the text encoder is left out.
    return STEPS * _unet_flops(options, 2 * spec.batch) + decoding


def write(spec: Spec) -> dict[str, Any]:
    """Writes weights, inputs and expected outputs; the FLOP of a call."""
    return {
        "flop": {
            "unet": _write_unet,
            "first_call": _write_unet,
            "train": _write_train,
            "sampler": _write_sampler,
            "text_to_image": _write_text_to_image,
        }[spec.kind](spec)
    }
