"""Sizes and costs of `compress.local`: the V it can give, FLOPs, published defaults."""

import math

from vlm_jax.compress import flops
from vlm_jax.compress.contract import Cost, Count
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec
from vlm_jax.ops import grid_shapes
from vlm_jax.ops.grid_shapes import GridShape


def cell_tokens(grid: GridShape) -> tuple[int, ...]:
    return tuple(grid_shapes.cell_shapes(grid))


def tapped_layers(encoder: EncoderSpec) -> tuple[int, ...]:
    """Blocks n/2, 2n/3, n-2 and n-1 (12, 16, 22 and 23 of CLIP-L's 24, as published), none after that of the tokens;
    all of four or fewer."""
    n, last = encoder.depth, encoder.feature_layer or encoder.depth
    chosen = (n // 2, 2 * n // 3, n - 2, n - 1) if n > 4 else range(1, n + 1)
    return tuple(sorted({min(block, last) for block in chosen}))


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """As published: the encoder's width, 8 heads (or the gcd of 8 and the width), one layer, no inner MLP."""
    width, taps = encoder.width, len(tapped_layers(encoder))
    return CompressorSpec(name, tokens, encoder.token_grid, width, taps, decoder.width, width, math.gcd(8, width), 1, 0)


def tokenpacker_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    down = grid_shapes.weighted_mean_flops(spec.grid, cell_shape(spec), spec.encoder_width)
    return Cost(down + flops.linear_flops(spec.tokens, spec.encoder_width, spec.width) + _cells_flops(spec))


def quecc_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    """All of it for each question: keys and values could be cached, but are not."""
    patches = spec.grid[0] * spec.grid[1]
    text = flops.linear_flops(1, spec.text_width, spec.encoder_width)
    query = flops.mlp_flops(patches, spec.encoder_width, spec.width, spec.width)
    return Cost(0.0, text + query + flops.linear_flops(patches, spec.width, 1) + _cells_flops(spec))


def cell_shape(spec: CompressorSpec) -> GridShape:
    return grid_shapes.cell_shapes(spec.grid)[spec.tokens]


def _cells_flops(spec: CompressorSpec) -> float:
    patches = spec.grid[0] * spec.grid[1]
    features = flops.mlp_flops(patches, max(spec.taps, 1) * spec.encoder_width, spec.width, spec.width)
    return 2 * features + flops.attention_flops(spec.tokens, patches, patches, spec.width, spec.encoder_width)
