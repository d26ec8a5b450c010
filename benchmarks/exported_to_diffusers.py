"""Writes every network that diffusers or transformers has too, and reads it with theirs.

python benchmarks/exported_to_diffusers.py                 # needs torch, diffusers, transformers
python benchmarks/exported_to_diffusers.py --only "UNet*"

Every row is a small network with random weights: `save_pretrained` writes it, the other library's
from_pretrained reads it and must report no missing and no unexpected tensor, and both are given
the same inputs. Printed are the largest difference of their outputs and the largest output; a row
fails where the first is more than 2e-5 of the second, and the command then ends with 1. The last
rows are pipelines that diffusers' DiffusionPipeline reads.
"""

import argparse
import fnmatch
import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from diffusion_jax.conditioners.clip_projection import clip_projection
from diffusion_jax.core.condition import Condition
from diffusion_jax.pretrained import (
    COMPONENTS,
    Loaded,
    Pipeline,
    from_config,
    save_pretrained,
)

TOLERANCE = 2e-5
Inputs = dict[str, Any]
Outputs = dict[str, Any]


class Row(NamedTuple):
    """One network: its class and options, the same inputs for both, and how each is called."""

    class_name: str
    options: Mapping[str, Any]
    inputs: Inputs
    ours: Callable[[Loaded, Inputs], Outputs]
    theirs: Callable[[Any, Inputs], Outputs]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def nhwc(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), 1, -1)


def nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def random_network(class_name: str, options: Mapping[str, Any]) -> Loaded:
    """Kernels that keep the variance of their input, and every other leaf away from its default."""
    component, rng = COMPONENTS[class_name], np.random.default_rng(0)
    config = component.read(options)

    def random(path: Any, leaf: Any) -> jax.Array:
        value = rng.normal(size=leaf.shape)
        if len(leaf.shape) > 1:
            value /= np.sqrt(np.prod(leaf.shape[:-1]))
        elif path[-1].key == "scale":
            value = 1.0 + 0.2 * value
        return jnp.asarray(value, jnp.float32)

    params = jax.tree_util.tree_map_with_path(random, component.shapes(config))
    return Loaded(class_name, config, config.build(), params)


def our_unet(loaded: Loaded, inputs: Inputs) -> Outputs:
    conditioner = loaded.config.conditioner()

    @jax.jit
    def apply(params: Any, x: Any, t: Any, batch: Any) -> Any:
        cond = conditioner.apply(params.get("conditioner", {}), batch, None)
        return loaded.module.apply({"params": params["network"]}, x, t, cond)

    return {
        "out": nchw(
            apply(loaded.params, nhwc(inputs["sample"]), inputs["timestep"], inputs["batch"])
        )
    }


def their_unet(model: Any, inputs: Inputs) -> Outputs:
    arguments = tensors(inputs["theirs"])
    t = torch.tensor(inputs["timestep"])
    return {"out": model(torch.tensor(inputs["sample"]), t, **arguments).sample}


def tensors(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: tensors(value) for name, value in tree.items()}
    return torch.tensor(tree) if isinstance(tree, np.ndarray) else tree


def unet(class_name: str, options: Mapping[str, Any], theirs: Inputs, batch: Inputs) -> Row:
    channels = options.get("in_channels", 4)
    inputs = {
        "sample": normal(2, channels, 8, 8),
        "timestep": np.array([3.0, 700.0], np.float32),
        "theirs": theirs,
        "batch": batch,
    }
    return Row(class_name, options, inputs, our_unet, their_unet)


UNET2D = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
TOKENS = normal(2, 5, 12)
LABELS = np.array([1, 4], np.int64)
CONDITION = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
SIZES = np.array([[64, 64, 0, 0, 64, 64], [32, 48, 1, 2, 32, 48]], np.float32)


def unets() -> dict[str, Row]:
    tokens = {"encoder_hidden_states": TOKENS}
    rows = {
        "UNet2D": unet("UNet2DModel", UNET2D, {}, {}),
        "UNet2D of classes": unet(
            "UNet2DModel",
            {**UNET2D, "num_class_embeds": 6, "resnet_time_scale_shift": "scale_shift",
             "attn_norm_num_groups": 4, "downsample_type": "resnet", "upsample_type": "resnet"},
            {"class_labels": LABELS},
            {"label": LABELS},
        ),
        "UNet of SD 1": unet("UNet2DConditionModel", CONDITION, tokens, {"tokens": TOKENS}),
        "UNet of SD 2": unet(
            "UNet2DConditionModel",
            {**CONDITION, "use_linear_projection": True, "attention_head_dim": [2, 4]},
            tokens,
            {"tokens": TOKENS},
        ),
        "UNet of SDXL": unet(
            "UNet2DConditionModel",
            {**CONDITION, "use_linear_projection": True, "transformer_layers_per_block": [1, 2],
             "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
             "projection_class_embeddings_input_dim": 6 * 4 + 10},
            {**tokens, "added_cond_kwargs": {"text_embeds": normal(2, 10), "time_ids": SIZES}},
            {"tokens": TOKENS, "text_embedding": normal(2, 10), "sizes": SIZES},
        ),
        "UNet of an upscaler": unet(
            "UNet2DConditionModel",
            {**CONDITION, "in_channels": 7, "num_class_embeds": 10,
             "only_cross_attention": [True, False]},
            {**tokens, "class_labels": LABELS},
            {"tokens": TOKENS, "label": LABELS},
        ),
        "UNet of IF": unet(
            "UNet2DConditionModel",
            {**CONDITION, "in_channels": 3, "out_channels": 6, "act_fn": "gelu",
             "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
             "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "cross_attention_dim": 32,
             "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
             "addition_embed_type": "text", "addition_embed_type_num_heads": 2,
             "encoder_hid_dim": 10, "encoder_hid_dim_type": "text_proj",
             "cross_attention_norm": "group_norm", "resnet_time_scale_shift": "scale_shift",
             "time_embedding_act_fn": "gelu", "class_embed_type": None},
            {"encoder_hidden_states": normal(2, 5, 10)},
            {"tokens": normal(2, 5, 10)},
        ),
        "UNet of GLIGEN": unet(
            "UNet2DConditionModel",
            {**CONDITION, "attention_type": "gated", "cross_attention_dim": 12,
             "attention_head_dim": 2},
            {**tokens, "cross_attention_kwargs": {"gligen": {
                "boxes": np.abs(normal(2, 3, 4)) % 1, "masks": np.eye(3, dtype=np.float32)[:2],
                "positive_embeddings": normal(2, 3, 12)}}},
            {"tokens": TOKENS, "boxes": np.abs(normal(2, 3, 4)) % 1,
             "box_mask": np.eye(3, dtype=np.float32)[:2], "box_text": normal(2, 3, 12)},
        ),
    }  # fmt: skip
    return rows


AUTOENCODER = {
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
PRIOR = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 2,
    "embedding_dim": 12,
    "num_embeddings": 5,
}
TEXT_PROJECTION = {
    "clip_embeddings_dim": 12,
    "time_embed_dim": 16,
    "cross_attention_dim": 8,
}


def method(loaded: Loaded, name: str, *arguments: Any) -> Any:
    apply = jax.jit(lambda p, *a: loaded.module.apply({"params": p}, *a, method=name))
    return apply(loaded.params, *arguments)


def our_kl(loaded: Loaded, inputs: Inputs) -> Outputs:
    return {
        "mean": nchw(method(loaded, "encode", nhwc(inputs["image"])).mean),
        "decoded": nchw(method(loaded, "decode", nhwc(inputs["latents"]))),
    }


def their_kl(model: Any, inputs: Inputs) -> Outputs:
    image, latents = (torch.tensor(inputs[name]) for name in ("image", "latents"))
    return {
        "mean": model.encode(image).latent_dist.mean,
        "decoded": model.decode(latents).sample,
    }


def our_codec(loaded: Loaded, inputs: Inputs) -> Outputs:
    return {
        "encoded": nchw(method(loaded, "encode", nhwc(inputs["image"]))),
        "decoded": nchw(method(loaded, "decode", nhwc(inputs["latents"]))),
    }


def their_codec(model: Any, inputs: Inputs) -> Outputs:
    image, latents = (torch.tensor(inputs[name]) for name in ("image", "latents"))
    return {
        "encoded": model.encode(image).latents,
        "decoded": model.decode(latents).sample,
    }


def our_prior(loaded: Loaded, inputs: Inputs) -> Outputs:
    cond = Condition(vector=inputs["embedding"], tokens=inputs["tokens"])
    apply = jax.jit(loaded.module.apply)
    return {"out": apply({"params": loaded.params["network"]}, inputs["x"], inputs["t"], cond)}


def their_prior(model: Any, inputs: Inputs) -> Outputs:
    x, t, embedding, tokens = (torch.tensor(inputs[n]) for n in ("x", "t", "embedding", "tokens"))
    return {"out": model(x, t, embedding, tokens).predicted_image_embedding}


def our_projection(loaded: Loaded, inputs: Inputs) -> Outputs:
    conditioner = clip_projection(loaded.config)
    cond = jax.jit(lambda p, b: conditioner.apply(p, b, None))(loaded.params, inputs)
    return {"tokens": cond.tokens, "vector": cond.vector}


def their_projection(model: Any, inputs: Inputs) -> Outputs:
    tokens, vector = model(
        image_embeddings=torch.tensor(inputs["image_embedding"]),
        prompt_embeds=torch.tensor(inputs["text_embedding"]),
        text_encoder_hidden_states=torch.tensor(inputs["text_tokens"]),
        do_classifier_free_guidance=False,
    )
    return {"tokens": tokens, "vector": vector}


def our_dit(loaded: Loaded, inputs: Inputs) -> Outputs:
    return our_unet(loaded, {**inputs, "batch": {"label": inputs["labels"]}})


def their_dit(model: Any, inputs: Inputs) -> Outputs:
    x, t, labels = (torch.tensor(inputs[name]) for name in ("sample", "timestep", "labels"))
    return {"out": model(x, t, class_labels=labels).sample}


def our_dense(loaded: Loaded, inputs: Inputs) -> Outputs:
    return {"out": loaded.module.apply({"params": loaded.params}, inputs["x"])}


def their_dense(model: Any, inputs: Inputs) -> Outputs:
    return {"out": model(torch.tensor(inputs["x"]))}


def others() -> dict[str, Row]:
    codec = {"image": normal(2, 3, 16, 16), "latents": normal(2, 4, 8, 8)}
    vq = {"image": normal(2, 3, 16, 16), "latents": normal(2, 3, 8, 8)}
    tiny = {
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [1, 1],
    }
    # diffusers' spatial norms have 32 groups, whatever the options say.
    wide = {"block_out_channels": [32, 64], "norm_num_groups": 32}
    spatial = {**AUTOENCODER, **wide, "num_vq_embeddings": 16, "norm_type": "spatial"}
    prior = {
        "x": normal(2, 12),
        "t": np.array([3.0, 700.0], np.float32),
        "embedding": normal(3, 12)[:2],
        "tokens": normal(2, 5, 12),
    }
    projection = {
        "image_embedding": normal(2, 12),
        "text_embedding": normal(3, 12)[:2],
        "text_tokens": normal(2, 5, 12),
    }
    dit = {"sample": normal(2, 4, 8, 8), "timestep": np.array([3, 700]), "labels": LABELS}
    return {
        "AutoencoderKL": Row("AutoencoderKL", AUTOENCODER, codec, our_kl, their_kl),
        "VQModel": Row(
            "VQModel", {**AUTOENCODER, "num_vq_embeddings": 16}, vq, our_codec, their_codec
        ),
        "VQModel of spatial norms": Row("VQModel", spatial, vq, our_codec, their_codec),
        "AutoencoderTiny": Row("AutoencoderTiny", tiny, codec, our_codec, their_codec),
        "PriorTransformer": Row("PriorTransformer", PRIOR, prior, our_prior, their_prior),
        "UnCLIPTextProjModel": Row(
            "UnCLIPTextProjModel", TEXT_PROJECTION, projection, our_projection, their_projection
        ),
        "CLIPImageProjection": Row(
            "CLIPImageProjection", {"hidden_size": 6}, {"x": normal(2, 6)}, our_dense, their_dense
        ),
        "DiT": Row("DiTTransformer2DModel", DIT, dit, our_dit, their_dit),
    }


CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 12,
}
CLIP_TEXT = {**CLIP, "vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": 59}
CLIP_VISION = {**CLIP, "image_size": 16, "patch_size": 4}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
LDM_BERT = {
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "d_model": 16,
    "encoder_ffn_dim": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "head_dim": 6,
}


def our_encoder(loaded: Loaded, inputs: Inputs) -> Outputs:
    x = inputs["pixels"] if "pixels" in inputs else inputs["ids"]
    x = nhwc(x) if "pixels" in inputs else x.astype(np.int32)
    encoded = jax.jit(loaded.module.apply)({"params": loaded.params}, x)
    found = {"last": encoded.last, "pooled": encoded.pooled, "projected": encoded.projected}
    return {name: value for name, value in found.items() if value is not None}


def their_encoder(model: Any, inputs: Inputs) -> Outputs:
    out = model(torch.tensor(inputs["pixels"] if "pixels" in inputs else inputs["ids"]))
    found = {
        "last": out[0] if isinstance(out, tuple) else out.last_hidden_state,
        "pooled": getattr(out, "pooler_output", None),
    }
    for name in ("text_embeds", "image_embeds"):
        if getattr(out, name, None) is not None:
            found["projected"] = getattr(out, name)
    return {name: value for name, value in found.items() if value is not None}


def encoders() -> dict[str, Row]:
    ids = np.random.default_rng(0).integers(2, 58, (2, 8))
    ids[:, 6:] = 59
    text, pixels = {"ids": ids}, {"pixels": normal(2, 3, 16, 16)}
    options = {
        "CLIPTextModel": (CLIP_TEXT, text),
        "CLIPTextModelWithProjection": (CLIP_TEXT, text),
        "CLIPVisionModel": (CLIP_VISION, pixels),
        "CLIPVisionModelWithProjection": (CLIP_VISION, pixels),
        "T5EncoderModel": ({**T5, "feed_forward_proj": "gated-gelu"}, text),
        "LDMBertModel": (LDM_BERT, text),
    }
    return {
        name: Row(name, config, inputs, our_encoder, their_encoder)
        for name, (config, inputs) in options.items()
    }


# Where a class is that is no attribute of its package.
MODULES = {
    "UnCLIPTextProjModel": "diffusers.pipelines.deprecated.unclip.text_proj",
    "CLIPImageProjection": "diffusers.pipelines.stable_diffusion.clip_image_project_model",
    "LDMBertModel": "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion",
}


def their_class(name: str) -> Any:
    if name in MODULES:
        return getattr(importlib.import_module(MODULES[name]), name)
    return getattr(diffusers, name, None) or getattr(transformers, name)


def read_by_them(class_name: str, folder: Path) -> tuple[Any, list[str]]:
    """The other library's network, and the tensors that it reports to be wrong."""
    model, info = their_class(class_name).from_pretrained(folder, output_loading_info=True)
    wrong = [f"{kind}: {sorted(map(str, names))}" for kind, names in info.items() if names]
    return model.eval(), wrong


def show(name: str, row: Row) -> bool:
    """Prints a row; whether it passed."""
    loaded = random_network(row.class_name, row.options)
    with tempfile.TemporaryDirectory() as place:
        save_pretrained(loaded, place)
        model, wrong = read_by_them(row.class_name, Path(place))
    if wrong:
        print(f"{name:30} {'':10} {'':10} FAILED {'; '.join(wrong)}")
        return False
    with torch.no_grad():
        theirs = {k: np.asarray(v.numpy()) for k, v in row.theirs(model, row.inputs).items()}
    ours = {k: np.asarray(v) for k, v in row.ours(loaded, row.inputs).items()}
    # Everything that the other library says; ours may say more, such as what it projects.
    shapes = {k: (ours[k].shape if k in ours else None, theirs[k].shape) for k in theirs}
    wrong += [f"{k}: {pair[0]}, {pair[1]}" for k, pair in shapes.items() if pair[0] != pair[1]]
    shared = [k for k, pair in shapes.items() if pair[0] == pair[1]]
    error = max((float(np.max(np.abs(ours[k] - theirs[k]))) for k in shared), default=np.inf)
    largest = max((float(np.max(np.abs(theirs[k]))) for k in shared), default=0.0)
    passed = not wrong and error <= TOLERANCE * largest
    about = "passed" if passed else "FAILED"
    print(f"{name:30} {error:10.2e} {largest:10.2e} {about} {'; '.join(wrong)}".rstrip())
    return passed


def pipelines() -> dict[str, Pipeline]:
    ddim = from_config({"_class_name": "DDIMScheduler", "clip_sample": False})
    ddpm = from_config({"_class_name": "DDPMScheduler"})
    vq = random_network("VQModel", {**AUTOENCODER, "num_vq_embeddings": 16})
    upscaler = random_network("UNet2DModel", {**UNET2D, "in_channels": 6})
    unet = random_network("UNet2DModel", UNET2D)
    return {
        "DDPMPipeline": Pipeline("DDPMPipeline", {"unet": unet, "scheduler": ddpm}),
        "LDMSuperResolutionPipeline": Pipeline(
            "LDMSuperResolutionPipeline", {"unet": upscaler, "vqvae": vq, "scheduler": ddim}
        ),
        "DiTPipeline": Pipeline(
            "DiTPipeline",
            {
                "transformer": random_network("DiTTransformer2DModel", DIT),
                "vae": random_network("AutoencoderKL", AUTOENCODER),
                "scheduler": ddim,
            },
        ),
    }


def show_pipeline(name: str, pipeline: Pipeline) -> bool:
    """Prints whether diffusers reads a pipeline, and has the weights of its parts."""
    with tempfile.TemporaryDirectory() as place:
        save_pretrained(pipeline, place, max_shard_size=20_000)
        theirs = diffusers.DiffusionPipeline.from_pretrained(place)
    parts = {key: part for key, part in pipeline.items() if isinstance(part, Loaded)}
    count = {
        key: sum(leaf.size for leaf in jax.tree.leaves(part.params)) for key, part in parts.items()
    }
    same = type(theirs).__name__ == name and all(
        sum(p.numel() for p in getattr(theirs, key).parameters()) == count[key] for key in parts
    )
    print(f"{name:30} {'':10} {'':10} {'passed' if same else 'FAILED'}")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="glob of rows")
    only = parser.parse_args().only
    jax.config.update("jax_default_matmul_precision", "highest")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"{'network':30} {'difference':>10} {'largest':>10}")
    rows = {**unets(), **others(), **encoders()}
    passed = [show(name, row) for name, row in rows.items() if fnmatch.fnmatchcase(name, only)]
    passed += [
        show_pipeline(name, pipeline)
        for name, pipeline in pipelines().items()
        if fnmatch.fnmatchcase(name, only)
    ]
    print(f"{sum(passed)} of {len(passed)} passed")
    return 0 if all(passed) and passed else 1


if __name__ == "__main__":
    sys.exit(main())
