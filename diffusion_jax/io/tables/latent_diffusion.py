"""A whole latent diffusion in one file, as CompVis and Stability AI released them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion_jax.io.tables.autoencoder import COMPVIS_IGNORE, compvis_kl_config, compvis_vq_config
from diffusion_jax.io.tables.clip import ORIGINAL_IGNORED, POSITION_IDS, clip_text_config
from diffusion_jax.io.tables.compvis import UNET, compvis_unet_config
from diffusion_jax.io.tables.ldm_bert import bert_embedder_config
from diffusion_jax.io.tables.options import UnsupportedOption, complete, require, require_integers
from diffusion_jax.io.tables.unet_blocks import UNetForm

# What precedes the names of the parts in a file.
UNET_PREFIX = "model.diffusion_model."
FIRST_STAGE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model."
EMA_PREFIX = "model_ema."

# Tensors that files hold beside the parts' weights: tables of the schedule, averages of the
# UNet's weights, weights of the first stage's losses.
IGNORED = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
    "scale_factor",
    f"{EMA_PREFIX}*",
    *(f"{FIRST_STAGE_PREFIX}{name}" for name in COMPVIS_IGNORE),
    *(f"{TEXT_PREFIX}{name}" for name in (*POSITION_IDS, *ORIGINAL_IGNORED)),
    f"{TEXT_PREFIX}model.logit_scale",
)


class Part(NamedTuple):
    """A part of a latent diffusion.

    Attributes:
      kind: of first stage "kl" or "vq", of text encoder "clip", "open_clip", "bert" or "class".
      fields: of our configuration, as plain values.
      skip: blocks of a text encoder that its tokens leave out; 1 for the penultimate layer.
    """

    kind: str
    fields: dict[str, Any]
    skip: int = 0


class LatentDiffusion(NamedTuple):
    """What the configuration of a LatentDiffusion means here.

    Attributes:
      unet: the denoising network.
      first_stage: the autoencoder of which it denoises the latents; None for images themselves.
      text: what makes its tokens; None where there is nothing to be learned or loaded.
      schedule: arguments of `noise_schedule`.
      prediction: "eps", "x0" or "v".
    """

    unet: UNetForm
    first_stage: Part | None
    text: Part | None
    schedule: dict[str, Any]
    prediction: str


_DEFAULTS: Mapping[str, Any] = {
    "unet_config": None,
    "first_stage_config": None,
    "cond_stage_config": None,
    "beta_schedule": "linear",
    "timesteps": 1000,
    "linear_start": 1e-4,
    "linear_end": 2e-2,
    "cosine_s": 8e-3,
    "given_betas": None,
    "scale_factor": 1.0,
    "scale_by_std": False,
    "parameterization": "eps",
    # How the condition enters and what it is called; what follows is about training and logging.
    **dict.fromkeys(
        """
        conditioning_key image_size channels first_stage_key cond_stage_key concat_keys concat_mode
        masked_image_key low_scale_key noise_level_key depth_stage_key cond_stage_forward
        cond_stage_trainable num_timesteps_cond log_every_t monitor loss_type v_posterior
        original_elbo_weight l_simple_weight learn_logvar logvar_init use_ema clip_denoised
        use_positional_encodings scheduler_config ckpt_path ignore_keys load_only_unet
        embedding_dropout make_it_fit ucg_training reset_ema reset_num_ema_updates finetune_keys
        unet_trainable
        """.split()
    ),
}
# Which differ in how their conditions are made.
CLASSES = ("LatentDiffusion", "LatentInpaintDiffusion")
_PREDICTIONS = {"eps": "eps", "x0": "x0", "v": "v"}
# Parts of a file of settings that say nothing about the model.
_BESIDE = ("data", "lightning")

# What FrozenCLIPEmbedder loads by this name, in the terms of transformers.
CLIP_VERSIONS: Mapping[str, Mapping[str, Any]] = {
    "openai/clip-vit-large-patch14": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
    }
}
# What FrozenOpenCLIPEmbedder makes by this name: fields of our CLIPTextConfig.
OPEN_CLIPS: Mapping[str, Mapping[str, Any]] = {
    "ViT-H-14": {
        "vocab_size": 49408,
        "length": 77,
        "width": 1024,
        "num_layers": 24,
        "num_heads": 16,
        "mlp_width": 4096,
        "activation": "gelu",
        "end_id": None,
        "projection": 1024,
    }
}
_CLIP_ARGUMENTS = ("device", "max_length", "freeze", "n_repeat")


def _target(config: Any, what: str) -> tuple[str, dict[str, Any]]:
    """(target, params) of a part."""
    if not isinstance(config, Mapping) or not isinstance(config.get("target"), str):
        raise UnsupportedOption(f"{what} must be an object with a target, got {config!r}")
    unknown = sorted(set(config) - {"target", "params"} - {"base_learning_rate"})
    if unknown:
        raise UnsupportedOption(f"{what} has target and params, got {unknown} as well")
    params = config.get("params") or {}
    if not isinstance(params, Mapping):
        raise UnsupportedOption(f"params of {what} must be an object, got {params!r:.99}")
    return config["target"], dict(params)


def _first_stage(config: Any, scale: float) -> Part | None:
    if config is None:
        return None
    target, params = _target(config, "first_stage_config")
    name = target.rpartition(".")[2]
    if name in ("Identity", "IdentityFirstStage"):
        return None
    if name == "AutoencoderKL":
        return Part("kl", compvis_kl_config(params, scaling_factor=scale))
    if name in ("VQModel", "VQModelInterface"):
        return Part("vq", compvis_vq_config(params, scaling_factor=scale))
    raise UnsupportedOption(
        "target of first_stage_config must be an AutoencoderKL, VQModel, VQModelInterface, "
        f"IdentityFirstStage or Identity, got {target}"
    )


def _clip(params: Mapping[str, Any]) -> Part:
    if "hidden_size" in params:
        return Part("clip", clip_text_config(params, projection=False))
    defaults = {
        **dict.fromkeys(_CLIP_ARGUMENTS),
        "version": next(iter(CLIP_VERSIONS)),
        "layer": "last",
        "layer_idx": None,
    }
    full = complete(params, defaults, "FrozenCLIPEmbedder")
    if full["version"] not in CLIP_VERSIONS:
        raise UnsupportedOption(
            f"version of FrozenCLIPEmbedder must be one of {list(CLIP_VERSIONS)}, "
            f"got {full['version']!r}; give the options of a CLIPTextConfig instead"
        )
    if full["layer"] != "last":
        raise UnsupportedOption(
            f"layer of FrozenCLIPEmbedder must be 'last', got {full['layer']!r}"
        )
    return Part("clip", clip_text_config(CLIP_VERSIONS[full["version"]], projection=False))


def _open_clip(params: Mapping[str, Any]) -> Part:
    defaults = {
        **dict.fromkeys(_CLIP_ARGUMENTS),
        "arch": next(iter(OPEN_CLIPS)),
        # Which weights of that architecture; they are in the file.
        "version": None,
        "layer": "last",
    }
    owner = "FrozenOpenCLIPEmbedder"
    full = complete(params, defaults, owner)
    require(full, {"arch": tuple(OPEN_CLIPS), "layer": ("last", "penultimate")}, owner)
    return Part("open_clip", dict(OPEN_CLIPS[full["arch"]]), int(full["layer"] == "penultimate"))


def _bert(params: Mapping[str, Any]) -> Part:
    return Part("bert", bert_embedder_config(params))


def _classes(params: Mapping[str, Any]) -> Part:
    defaults = {"embed_dim": None, "n_classes": 1000, "key": "class"}
    full = complete(params, defaults, "ClassEmbedder")
    require_integers(full, ("embed_dim", "n_classes"), "ClassEmbedder")
    return Part("class", {"num_classes": full["n_classes"], "dim": full["embed_dim"]})


_TEXTS: Mapping[str, Callable[[Mapping[str, Any]], Part]] = {
    "FrozenCLIPEmbedder": _clip,
    "FrozenOpenCLIPEmbedder": _open_clip,
    "BERTEmbedder": _bert,
    "ClassEmbedder": _classes,
}
# A condition that is an image, or none.
_NO_TEXT = ("__is_first_stage__", "__is_unconditional__")


def _text(config: Any) -> Part | None:
    if config is None or config in _NO_TEXT:
        return None
    target, params = _target(config, "cond_stage_config")
    name = target.rpartition(".")[2]
    if name == "Identity":
        return None
    if name not in _TEXTS:
        raise UnsupportedOption(
            f"target of cond_stage_config must be one of {', '.join(_TEXTS)} or Identity, or "
            f"{' or '.join(_NO_TEXT)}, got {target}"
        )
    return _TEXTS[name](params)


def _model(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(target, params) of the model in a file of settings."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    if "model" in given:
        unknown = sorted(set(given) - {"model", *_BESIDE})
        if unknown:
            raise UnsupportedOption(
                f"a file of settings has model, {' and '.join(_BESIDE)}, got {unknown} as well"
            )
        given = given["model"]
    return _target(given, "model")


def first_stage_config(config: Mapping[str, Any]) -> Part:
    """Translates the settings of an autoencoder that was released alone.

    Args:
      config: the parsed YAML or JSON, with "model" at its top, or what "model" says.

    Raises:
      UnsupportedOption: naming the option and the value that is not computed here.
    """
    target, params = _model(config)
    part = _first_stage({"target": target, "params": params}, 1.0)
    if part is None:
        raise UnsupportedOption(f"the target of model must be an autoencoder, got {target}")
    return part


def latent_diffusion_config(config: Mapping[str, Any]) -> LatentDiffusion:
    """Translates the settings of a LatentDiffusion.

    Args:
      config: the parsed YAML or JSON, with "model" at its top, or what "model" says.

    Raises:
      UnsupportedOption: naming the part, the option and the value that is not computed here.
    """
    target, params = _model(config)
    if target.rpartition(".")[2] not in CLASSES:
        raise UnsupportedOption(
            f"the target of model must be {' or '.join(CLASSES)} of ldm.models.diffusion.ddpm, "
            f"got {target}"
        )
    full = complete(params, _DEFAULTS, "LatentDiffusion")
    if full["given_betas"] is not None:
        raise UnsupportedOption("given_betas of LatentDiffusion must be None")
    if full["scale_by_std"]:
        raise UnsupportedOption(
            "scale_by_std must be False, since the factor is the tensor scale_factor of the file "
            "of weights then: give it as scale_factor, which from_original does"
        )
    if full["parameterization"] not in _PREDICTIONS:
        raise UnsupportedOption(
            f"parameterization must be one of {', '.join(_PREDICTIONS)}, "
            f"got {full['parameterization']!r}"
        )
    target, unet = _target(full["unet_config"], "unet_config")
    if not target.endswith(UNET):
        raise UnsupportedOption(f"the target of unet_config must be a {UNET}, got {target}")
    schedule = ("beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s")
    return LatentDiffusion(
        compvis_unet_config(unet),
        _first_stage(full["first_stage_config"], full["scale_factor"]),
        _text(full["cond_stage_config"]),
        {name: full[name] for name in schedule},
        _PREDICTIONS[full["parameterization"]],
    )
