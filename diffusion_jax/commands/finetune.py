"""finetune: goes on training a released text-to-image pipeline, whole or by LoRA."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from diffusion_jax.commands.run import check_workdir, checkpoints, open_loggers, readable
from diffusion_jax.core.lora import ATTENTION, init_lora, merge_lora
from diffusion_jax.core.types import Logger, Params
from diffusion_jax.data.batching import batches
from diffusion_jax.data.cache import precompute
from diffusion_jax.data.pipeline import TFDS, Cached, Folder, WebDataset
from diffusion_jax.data.sources import Source
from diffusion_jax.data.text import Tokenized
from diffusion_jax.data.tfds_source import open_prepared
from diffusion_jax.data.transforms import image_grid
from diffusion_jax.io.files import write_text
from diffusion_jax.io.shards import read_json
from diffusion_jax.pretrained import Pipeline, from_pretrained, save_lora, save_pretrained
from diffusion_jax.pretrained.calls.stable_diffusion import denoise_phase
from diffusion_jax.pretrained.schedulers import beta_schedule
from diffusion_jax.systems.fine_tuning import FineTuning
from diffusion_jax.systems.latent_diffusion import EncodeImage, EncodeTexts
from diffusion_jax.training.ema import EMA
from diffusion_jax.training.guard import Guard
from diffusion_jax.training.loop import LoopConfig, OnEval, fit
from diffusion_jax.training.optimizer import Optimizer
from diffusion_jax.training.parallel import (
    check_batch_size,
    make_mesh,
    mesh_train,
    shard_state,
    to_host,
)
from diffusion_jax.training.processes import (
    Processes,
    agree_from_writer,
    barrier,
    check_agreement,
    initialize,
    is_writer,
)
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_train_step

_CACHE_BATCH = 16
_PROBE = "a cat"
# Options that may change where a run is gone on with.
_FREE = (
    *("num_steps", "log_every", "eval_every", "checkpoint_every", "prompt"),
    *("guard", "on_bad_example", "num_workers", "fsdp"),
    *("tensorboard", "wandb", "processes", "trace", "workdir"),
)


@dataclass(frozen=True)
class FineTune:
    """Trains a Stable Diffusion on pictures with captions, whole or by LoRA.

    Writes checkpoints, metrics and sample pictures to workdir, and at the end what diffusers
    loads: workdir/lora with pytorch_lora_weights.safetensors, or workdir/pipeline. The same
    command goes on with an interrupted run.

    Attributes:
      model: folder or hub id of the pipeline.
      data: folder of pictures with captions (NAME.txt, captions.json or metadata.jsonl), a
        pattern of webdataset's shards, "set/*.tar", or "tfds:NAME", a prepared array_record set of
        tensorflow-datasets with the features image and caption.
      data_dir: folder of prepared sets of tensorflow-datasets; its own default if not given.
      cache: folder for the latents and the text embeddings of all pictures, which are computed
        once, before training, and not in every step. Same data, model and size go on with it.
      workdir: where everything goes.
      rank: of the LoRA; 0 trains the whole UNet.
      targets: globs of the kernels that the LoRA adapts.
      image_size: of the pictures in pixels; the UNet's own if not given.
      num_steps, batch_size, accumulate: updates, examples of one over all processes, and parts
        that it is computed in.
      learning_rate: of AdamW; 1e-4 if not given, 1e-5 where the whole UNet is trained.
      weight_decay: of AdamW.
      caption_dropout: probability of training without the caption, for guidance.
      ema: decay of the averaged weights, which are written at the end; 0 for none.
      dtype: of the frozen parameters and of the activations; what is trained is float32.
      seed: of data order, noise and the LoRA.
      guard: which updates are bad, and how many of them may be skipped.
      on_bad_example: "raise" stops at a picture that cannot be read, "skip" takes the next one.
      num_workers: processes that read data, in every process that trains; 0 reads in threads.
      fsdp: devices that parameters, averages and optimizer moments are split over.
      prompt: texts that are drawn every eval_every updates.
      log_every, eval_every, checkpoint_every: in updates.
      tensorboard: also write TensorBoard events (needs the extra "logging").
      wandb: also log to this project of Weights & Biases (needs the extra "logging").
      processes: how several processes of one job find each other; all of them see workdir.
      trace: trace five updates with jax.profiler into WORKDIR/trace.
      revision, variant: of the weights, see `from_pretrained`.
    """

    model: str
    data: str
    workdir: Path
    data_dir: str | None = None
    cache: Path | None = None
    rank: int = 4
    targets: tuple[str, ...] = ATTENTION
    image_size: int | None = None
    num_steps: int = 1000
    batch_size: int = 1
    accumulate: int = 1
    learning_rate: float | None = None
    weight_decay: float = 1e-2
    caption_dropout: float = 0.1
    ema: float = 0.0
    dtype: str | None = None
    seed: int = 0
    guard: Guard = Guard()
    on_bad_example: Literal["raise", "skip"] = "raise"
    num_workers: int = 0
    fsdp: int = 1
    prompt: tuple[str, ...] = ()
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 500
    tensorboard: bool = False
    wandb: str | None = None
    processes: Processes = Processes()
    trace: bool = False
    revision: str | None = None
    variant: str | None = None

    def run(self) -> int:
        """Trains, and writes the result."""
        initialize(self.processes)
        out = finetune(self)
        if is_writer():
            print(f"the result is in {out}")
        return 0


def _check(options: FineTune) -> None:
    if options.rank < 0:
        raise ValueError(f"rank must be at least 0, got {options.rank}")
    if options.data_dir is not None and not options.data.startswith("tfds:"):
        raise ValueError(f"data_dir belongs to --data tfds:NAME, got --data {options.data}")
    if options.eval_every and not options.prompt:
        raise ValueError("eval_every draws pictures of --prompt; give one")


def _pipeline(options: FineTune) -> Pipeline:
    found = from_pretrained(
        options.model, revision=options.revision, variant=options.variant, dtype=options.dtype
    )
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    if not isinstance(found, Pipeline) or any(found.get(name) is None for name in parts):
        raise ValueError(f"{options.model} must hold a pipeline with {', '.join(parts)}")
    unet, vae = found["unet"], found["vae"]
    if "text_encoder_2" in found or unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"finetune trains pipelines of one text encoder, told nothing but the text; "
            f"{options.model} is a {found.class_name}"
        )
    return found


def _source(options: FineTune, pipeline: Pipeline) -> Source:
    unet, vae = pipeline["unet"], pipeline["vae"]
    size = options.image_size
    if size is None:
        size = (unet.config.kept.get("sample_size") or 64) * vae.config.factor
    if not isinstance(size, int) or size % vae.config.factor:
        raise ValueError(f"image_size must be a multiple of {vae.config.factor}, got {size}")
    if options.data.startswith("tfds:"):
        data = TFDS(options.data.removeprefix("tfds:"), size, data_dir=options.data_dir)
    elif options.data.endswith(".tar"):
        data = WebDataset(options.data, size)
    else:
        data = Folder(options.data, size, captions=True)
    source = Tokenized(data.source(), pipeline["tokenizer"], tokens="ids")
    if options.cache is None:
        return source
    cache, tokenized = options.cache, source
    agree_from_writer(lambda: _fill(options, cache, tokenized, pipeline, size))
    return Cached(str(options.cache)).source()


def _digest(params: Params) -> str:
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _files(options: FineTune) -> str:
    """A digest of the names, sizes and times of the files that a set consists of."""
    data = options.data
    if data.startswith("tfds:"):
        data = str(open_prepared(data.removeprefix("tfds:"), options.data_dir).data_dir)
    found = sorted(Path(data).rglob("*")) if Path(data).is_dir() else map(Path, sorted(glob(data)))
    about = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return hashlib.sha256(repr(about).encode()).hexdigest()


def _fill(options: FineTune, folder: Path, source: Source, pipeline: Pipeline, size: int) -> None:
    """Computes what is missing in the cache: posteriors of latents, and tokens of captions."""
    if not hasattr(pipeline["vae"].module, "moments"):
        raise ValueError("--cache keeps posteriors, which this autoencoder lacks; leave it out")
    vae, encoder = pipeline["vae"], pipeline["text_encoder"]
    texts = EncodeTexts(encoder.module)
    params = jax.device_put({"vae": vae.params, "text_encoder": encoder.params})

    @jax.jit
    def encode(params: Any, image: Any, ids: Any) -> dict[str, Any]:
        posterior = vae.module.apply({"params": params["vae"]}, image, method="encode")
        tokens = texts(params, {"ids": ids}, jax.numpy.zeros(0))["tokens"]
        return {"image_mean": posterior.mean, "image_std": posterior.std, "tokens": tokens}

    about = {
        "data": _files(options),
        "image_size": size,
        "weights": _digest({"vae": vae.params, "text_encoder": encoder.params}),
        "tokenizer": pipeline["tokenizer"](_PROBE).ids.tolist(),
        "dtype": str(options.dtype),
    }
    precompute(
        source,
        lambda batch: encode(params, batch["image"], batch["ids"]),
        folder,
        description=json.dumps(about, sort_keys=True),
        batch_size=min(_CACHE_BATCH, len(source)),
    )


def fine_tuning(pipeline: Pipeline, *, caption_dropout: float) -> FineTuning:
    """The loss of a pipeline that was loaded, on images and the integers of their captions.

    Raises:
      ValueError: if caption_dropout is out of range, or the scheduler has no table of β.
    """
    unet, vae = pipeline["unet"], pipeline["vae"]
    scheduler = pipeline["scheduler"]
    shape = (1, 1, vae.config.latent_channels)
    return FineTuning(
        denoise_phase(unet, scheduler, shape),
        EncodeTexts(pipeline["text_encoder"].module),
        EncodeImage(vae.config, vae.module),
        beta_schedule(scheduler),
        tuple(int(i) for i in pipeline["tokenizer"]("").ids),
        caption_dropout,
    )


def _values(options: FineTune) -> dict[str, Any]:
    """The options as JSON."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


def _check_options(options: FineTune) -> None:
    """Refuses a directory of another run."""
    values, path = _values(options), options.workdir / "finetune.json"
    if path.exists():
        old = read_json(path)
        changed = sorted(n for n in values if n not in _FREE and old.get(n) != values[n])
        if changed:
            raise ValueError(
                f"{options.workdir} holds a run with other values of {', '.join(changed)}; choose "
                "another --workdir, or run with the old values"
            )


def _params(options: FineTune, pipeline: Pipeline) -> Params:
    """All parameters; those that are trained in float32."""
    # A cache has all that the autoencoder says; the text encoder still encodes the empty caption.
    names = ("unet", "text_encoder") if options.cache else ("unet", "vae", "text_encoder")
    params = {name: pipeline[name].params for name in names}
    if options.rank:
        key = jax.random.fold_in(jax.random.key(options.seed), 1)
        targets = options.targets
        params["lora"] = init_lora(key, params["unet"], rank=options.rank, targets=targets)
    else:
        params["unet"] = jax.tree.map(lambda a: a.astype(np.float32), params["unet"])
    return params


def _result(pipeline: Pipeline, params: Params) -> Pipeline:
    """The pipeline with all parameters of the run; the training steps took over its own."""
    networks = {name: pipeline[name] for name in ("unet", "vae", "text_encoder")}
    trained = {name: params.get(name, part.params) for name, part in networks.items()}
    dtype = networks["unet"].module.param_dtype
    if "lora" in params:
        trained["unet"] = merge_lora(params["unet"], params["lora"])
    trained["unet"] = jax.tree.map(lambda a: a.astype(dtype), trained["unet"])
    return pipeline.replace(
        **{name: part._replace(params=trained[name]) for name, part in networks.items()}
    )


def finetune(options: FineTune) -> Path:
    """Trains as the options say, going on from the newest checkpoint.

    Returns:
      the folder that diffusers loads.

    Raises:
      ValueError: if pipeline, data, devices or directory do not fit.
    """
    _check(options)
    check_workdir(options.workdir)
    mesh = make_mesh(fsdp=options.fsdp)
    check_batch_size(options.batch_size, mesh, accumulate=options.accumulate)
    pipeline = _pipeline(options)
    source = _source(options, pipeline)
    loss = fine_tuning(pipeline, caption_dropout=options.caption_dropout).build()
    params = _params(options, pipeline)
    values = _values(options)
    fixed = {name: value for name, value in values.items() if name != "processes"}
    trained = ("lora/**",) if options.rank else ("unet/**",)
    rate = options.learning_rate or (1e-4 if options.rank else 1e-5)
    optimizer = Optimizer(name="adamw", learning_rate=rate, weight_decay=options.weight_decay)
    tx = optimizer.build()
    step = make_train_step(
        loss,
        tx,
        ema=EMA(options.ema),
        accumulate=options.accumulate,
        guard=options.guard,
        learning_rate=optimizer.learning_rate_at,
    )
    data = batches(
        source,
        batch_size=options.batch_size // jax.process_count(),
        seed=options.seed,
        keys=("image_mean", "image_std", "tokens") if options.cache else ("image", "ids"),
        on_bad_example=options.on_bad_example,
        num_workers=options.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    steps = checkpoints(options.workdir).steps()
    check_agreement({**fixed, "data": data.get_state(), "checkpoints": steps})
    agree_from_writer(lambda: _check_options(options))
    with (
        closing(data),
        # The base is read from its own files every time; a checkpoint knows only its digests.
        checkpoints(options.workdir, frozen=not options.rank, configuration=values) as checkpointer,
    ):
        # Before anything is written, since another run may be under way here.
        checkpointer.claim()
        path, text = options.workdir / "finetune.json", json.dumps(values, indent=2) + "\n"
        agree_from_writer(lambda: write_text(path, text))
        with open_loggers(
            options.workdir, tensorboard=options.tensorboard, wandb=options.wandb, values=values
        ) as loggers:
            state = fit(
                shard_state(mesh, TrainState.create(params, tx, trainable=trained)),
                mesh_train(step, mesh),
                data,
                key=jax.random.key(options.seed),
                config=LoopConfig(
                    num_steps=options.num_steps,
                    batch_size=options.batch_size,
                    log_every=options.log_every,
                    eval_every=options.eval_every or None,
                    checkpoint_every=options.checkpoint_every,
                    max_skipped=options.guard.max_skipped,
                    trace_dir=str(options.workdir / "trace") if options.trace else None,
                ),
                checkpointer=checkpointer,
                loggers=loggers,
                on_eval=_eval_hook(options, pipeline, loggers) if options.prompt else None,
            )
    out = options.workdir / ("lora" if options.rank else "pipeline")
    trained_params = to_host(state.ema_params)
    agree_from_writer(lambda: _write(options, pipeline, trained_params, out))
    barrier("written")
    return out


def _eval_hook(options: FineTune, pipeline: Pipeline, loggers: Sequence[Logger]) -> OnEval:
    """Draws every prompt."""

    def on_eval(number: int, state: TrainState) -> None:
        params = readable(state.ema_params)
        if not is_writer():
            return
        shown = _result(pipeline, params)
        images = shown(list(options.prompt), seed=options.seed, output_type="np").images
        picture = image_grid(2.0 * images - 1.0, len(images))
        for logger in loggers:
            logger.image(number, "samples", picture)

    return on_eval


def _write(options: FineTune, pipeline: Pipeline, params: Any, out: Path) -> None:
    import shutil

    if options.rank:
        base = pipeline["unet"]._replace(params=params["unet"])
        save_lora(out, {"unet": params["lora"]}, {"unet": base})
        return
    # Of an earlier end of the same run.
    shutil.rmtree(out, ignore_errors=True)
    save_pretrained(_result(pipeline, params), out)
