"""Sizes and costs of `compress.convolving`: the V it can give, FLOPs, published defaults."""

from vlm_jax.compress import flops
from vlm_jax.compress.contract import Cost, Count
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec
from vlm_jax.ops import grid_shapes


def ldpv2_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    pooled = grid_shapes.weighted_mean_flops(
        spec.grid, grid_shapes.pooling_shapes(spec.grid)[spec.tokens], spec.text_width
    )
    conv = flops.depthwise_flops(spec.tokens, spec.text_width)
    return Cost(pooled + conv, projected=spec.grid[0] * spec.grid[1])


def abstractor_defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """As published: three blocks a stage, of width 1024 (the encoder's, for a narrower one)."""
    width = min(encoder.width, 1024)
    return CompressorSpec(name, tokens, encoder.token_grid, encoder.width, 0, decoder.width, width, 1, 3, 0)


def abstractor_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    n, patches = round(spec.tokens**0.5), spec.grid[0] * spec.grid[1]
    pooled = grid_shapes.weighted_mean_flops(spec.grid, (n, n), spec.width)
    return Cost(_stage_flops(patches, spec.encoder_width, spec) + pooled + _stage_flops(n * n, spec.width, spec))


def _stage_flops(cells: int, inputs: int, spec: CompressorSpec) -> float:
    total, width = 0.0, spec.width
    for i in range(spec.depth):
        first = inputs if i == 0 else width
        ones = (2 if first != width else 1) * flops.linear_flops(cells, first, width)
        squeeze = flops.mlp_flops(1, width, round(first / 4), width)
        total += ones + flops.linear_flops(cells, width, width) + flops.depthwise_flops(cells, width) + squeeze
    return total
