"""Sizes and costs of `compress.querying`: the V it can give, FLOPs, published defaults."""

from vlm_jax.compress import flops
from vlm_jax.compress.contract import Cost, Count
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec
from vlm_jax.ops.grid_shapes import GridShape


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """One layer with the encoder's number of heads, 64 channels each (Flamingo) within E, and an MLP of 4 x width:
    width 1024, 16 heads and MLP 4096 for So400m and CLIP-L."""
    width = min(64 * encoder.heads, encoder.width)
    return CompressorSpec(
        name, tokens, encoder.token_grid, encoder.width, 0, decoder.width, width, encoder.heads, 1, 4 * width
    )


def resampler_tokens(grid: GridShape) -> tuple[int, ...]:
    return tuple(range(1, grid[0] * grid[1] + 1))


def resampler_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    patches, tokens, width = spec.grid[0] * spec.grid[1], spec.tokens, spec.width
    layer = flops.attention_flops(tokens, patches, tokens * patches, width, width)
    layer += flops.mlp_flops(tokens, width, spec.mlp_width, width)
    projections = (patches + tokens) * flops.linear_flops(1, width, spec.encoder_width)
    return Cost(projections + spec.depth * layer)
