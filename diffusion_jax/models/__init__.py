"""Networks: linen modules from x_t, the time and a condition to a prediction."""

from diffusion_jax.models.adm import adm_classifier, adm_levels, adm_unet, adm_upsampler
from diffusion_jax.models.attention import PixelAttention
from diffusion_jax.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    AutoencoderLevel,
)
from diffusion_jax.models.classifier import (
    ClassifierConfig,
    MLPClassifier,
    MLPClassifierConfig,
    NoisyClassifier,
)
from diffusion_jax.models.clip import (
    CLIP_TEXT_TOWERS,
    CLIP_VISION_TOWERS,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from diffusion_jax.models.convnext import ConvNeXtConfig
from diffusion_jax.models.dit import DiT, DiTConfig
from diffusion_jax.models.dit_sizes import latent_dit
from diffusion_jax.models.embeddings import Fourier, Learned, Sinusoidal
from diffusion_jax.models.first_stages import FIRST_STAGES
from diffusion_jax.models.gated_attention import FUSERS
from diffusion_jax.models.grounding import (
    GROUNDINGS,
    KeypointGroundingConfig,
    MapDownsamplerConfig,
    MapGroundingConfig,
    TextGroundingConfig,
    TextImageGroundingConfig,
)
from diffusion_jax.models.ldm_bert import LDMBertConfig
from diffusion_jax.models.levels import LevelConfig
from diffusion_jax.models.mlp import MLP, MLPConfig
from diffusion_jax.models.prior import Prior, PriorConfig
from diffusion_jax.models.t5 import T5_ENCODERS, T5Config
from diffusion_jax.models.text_attention import TextAttention
from diffusion_jax.models.tiny_autoencoder import AutoencoderTiny, AutoencoderTinyConfig
from diffusion_jax.models.transformer import SpatialTransformer
from diffusion_jax.models.unclip import kandinsky_prior, karlo_prior, shap_e_prior
from diffusion_jax.models.unet import UNet, UNetConfig
from diffusion_jax.models.vq import VQModel, VQModelConfig

NETWORKS = {"unet": UNetConfig, "mlp": MLPConfig, "dit": DiTConfig}
# Networks from x_t and the time to the logits of classes.
CLASSIFIERS = {"unet": ClassifierConfig, "mlp": MLPClassifierConfig}
# What may follow the residual blocks of a UNet's level.
ATTENTIONS = {"pixels": PixelAttention, "text": TextAttention, "transformer": SpatialTransformer}

__all__ = [
    "ATTENTIONS",
    "CLASSIFIERS",
    "CLIP_TEXT_TOWERS",
    "CLIP_VISION_TOWERS",
    "FIRST_STAGES",
    "FUSERS",
    "GROUNDINGS",
    "MLP",
    "NETWORKS",
    "T5_ENCODERS",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderLevel",
    "AutoencoderTiny",
    "AutoencoderTinyConfig",
    "CLIPConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "ClassifierConfig",
    "ConvNeXtConfig",
    "DiT",
    "DiTConfig",
    "Fourier",
    "KeypointGroundingConfig",
    "LDMBertConfig",
    "Learned",
    "LevelConfig",
    "MLPClassifier",
    "MLPClassifierConfig",
    "MLPConfig",
    "MapDownsamplerConfig",
    "MapGroundingConfig",
    "NoisyClassifier",
    "PixelAttention",
    "Prior",
    "PriorConfig",
    "Sinusoidal",
    "SpatialTransformer",
    "T5Config",
    "TextAttention",
    "TextGroundingConfig",
    "TextImageGroundingConfig",
    "UNet",
    "UNetConfig",
    "VQModel",
    "VQModelConfig",
    "adm_classifier",
    "adm_levels",
    "adm_unet",
    "adm_upsampler",
    "kandinsky_prior",
    "karlo_prior",
    "latent_dit",
    "shap_e_prior",
]
