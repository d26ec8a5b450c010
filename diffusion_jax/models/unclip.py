"""The configurations that diffusion priors were published with."""

from diffusion_jax.models.prior import PriorConfig


def karlo_prior() -> PriorConfig:
    """Karlo's, an open DALL-E 2: 1.02 billion parameters over CLIP ViT-L/14.

    Source: Ramesh et al. 2022 (arXiv:2204.06125), appendix C for its original; Lee et al. 2022,
    Karlo-v1.0.alpha, released code.
    """
    return PriorConfig(data_dim=768, width=2048, depth=20, num_heads=32)


def kandinsky_prior(version: str = "2.2") -> PriorConfig:
    """Kandinsky's: Karlo's sizes over CLIP ViT-L/14 (2.1) or ViT-bigG/14 (2.2).

    Args:
      version: "2.1" or "2.2".

    Raises:
      ValueError: if there is none of that version.

    Source: Razzhigaev et al. 2023 (arXiv:2310.03502), section 3 and released code.
    """
    widths = {"2.1": 768, "2.2": 1280}
    if version not in widths:
        raise ValueError(f"Kandinsky has a prior of version 2.1 and 2.2, got {version!r}")
    return PriorConfig(data_dim=widths[version], width=2048, depth=20, num_heads=32)


def shap_e_prior(condition: str = "text") -> PriorConfig:
    """Shap-E's, of 1024 latent tokens of 1024 numbers; mean and variance of each come out.

    Args:
      condition: "text" for the embedding of a text by CLIP ViT-L/14, [B, 768]; "image" for the
        256 tokens of an image, [B, 256, 1024].

    Raises:
      ValueError: if the condition is another one.

    Source: Jun & Nichol 2023 (arXiv:2305.02463), section 4.2 and released code.
    """
    if condition not in ("text", "image"):
        raise ValueError(f"Shap-E's priors are told a 'text' or an 'image', got {condition!r}")
    return PriorConfig(
        data_dim=1024,
        vector_dim=768 if condition == "text" else 1024,
        out_dim=2048,
        num_text_tokens=1024,
        num_other_tokens=0,
        width=1024,
        depth=24,
        num_heads=16,
        time_hidden=4096,
        time_activation="gelu",
        token_projection=False,
        vector_norm=condition == "image",
        norm_in=True,
        query=False,
    )
