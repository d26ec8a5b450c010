"""Names of latent diffusion's transformer blocks, which GLIGEN and diffusers kept."""

from diffusion_jax.io.mapping import Row, prefixed


def _attention(source: str, target: str) -> tuple[Row, ...]:
    return (
        Row(f"{source}.to_q", f"{target}/query", "linear"),
        Row(f"{source}.to_k", f"{target}/key", "linear"),
        Row(f"{source}.to_v", f"{target}/value", "linear"),
        Row(f"{source}.to_out.0", f"{target}/out", "linear"),
    )


_FEED_FORWARD = (
    Row("ff.net.0.proj", "ff/in", "linear"),
    Row("ff.net.2", "ff/out", "linear"),
)

# An adapter of GLIGEN, relative to its module.
FUSER_ROWS: tuple[Row, ...] = (
    Row("linear", "object_proj", "linear"),
    Row("norm1", "norm_attn", "norm"),
    *_attention("attn", "attn"),
    Row("alpha_attn", "alpha_attn", "param"),
    Row("norm2", "norm_ff", "norm"),
    *_FEED_FORWARD,
    Row("alpha_dense", "alpha_ff", "param"),
)

# A transformer block, relative to its module, with an adapter if it has one.
BLOCK_ROWS: tuple[Row, ...] = (
    Row("norm1", "norm_1", "norm"),
    *_attention("attn1", "attn_1"),
    *prefixed(FUSER_ROWS, source="fuser.", target="fuser/"),
    Row("norm2", "norm_2", "norm"),
    *_attention("attn2", "attn_2"),
    Row("norm3", "norm_3", "norm"),
    *_FEED_FORWARD,
)

# What diffusers' transformers without cross-attention (DiT, priors) share, relative to a block.
SELF_ATTENTION_BLOCK_ROWS: tuple[Row, ...] = (
    *_attention("attn1", "attn"),
    Row("norm3", "norm_2", "norm"),
    Row("ff.net.0.proj", "mlp_1", "linear"),
    Row("ff.net.2", "mlp_2", "linear"),
)


def spatial_transformer_rows(*, linear_projections: bool = False) -> tuple[Row, ...]:
    """The table of a spatial transformer, relative to its module.

    Args:
      linear_projections: the file has the projections into and out of the blocks as linear
        layers and not as 1x1 convolutions.
    """
    kind = "linear" if linear_projections else "conv1x1_as_linear"
    return (
        Row("norm", "norm", "norm"),
        Row("proj_in", "proj_in", kind),
        *prefixed(BLOCK_ROWS, source="transformer_blocks.{k}.", target="block_{k}/"),
        Row("proj_out", "proj_out", kind),
    )
