"""Sizes and costs of `compress.token_learner`: the V it can give, FLOPs, published defaults."""

from vlm_jax.compress import flops
from vlm_jax.compress.contract import Cost, Count
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec
from vlm_jax.ops.grid_shapes import GridShape

CONVS = 4


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """As published: 64 inner channels."""
    return CompressorSpec(name, tokens, encoder.token_grid, encoder.width, 0, decoder.width, 64, 1, 1, 0)


def learner_tokens(grid: GridShape) -> tuple[int, ...]:
    return tuple(range(1, grid[0] * grid[1] + 1))


def token_learner_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    patches = spec.grid[0] * spec.grid[1]
    scores = flops.mlp_flops(patches, spec.encoder_width, spec.width, spec.tokens)
    return Cost(scores + 2.0 * patches * spec.tokens * spec.encoder_width)


def token_learner_conv_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    patches, tokens = spec.grid[0] * spec.grid[1], spec.tokens
    convolutions = 18.0 * patches * tokens * (spec.encoder_width + (CONVS - 1) * tokens)
    return Cost(convolutions + 2.0 * patches * tokens * spec.encoder_width)
