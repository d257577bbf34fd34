"""Sizes and costs of `compress.mqt`: the V it can give, FLOPs, published defaults."""

from vlm_jax.compress import flops
from vlm_jax.compress.contract import Cost, Count
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec
from vlm_jax.ops.grid_shapes import GridShape

QUERIES = 256


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """As published: 256 queries, at the encoder's width with its number of heads (16 for CLIP-L)."""
    sizes = (encoder.width, encoder.heads, 1, 0)
    return CompressorSpec(name, tokens, encoder.token_grid, encoder.width, 0, decoder.width, *sizes, queries=QUERIES)


def mqt_tokens(grid: GridShape) -> tuple[int, ...]:
    return tuple(range(1, min(QUERIES, grid[0] * grid[1]) + 1))


def problem(spec: CompressorSpec) -> str:
    side = round(spec.queries**0.5)
    if side**2 != spec.queries or spec.queries < spec.tokens:
        return f"queries={spec.queries} must be a square of at least tokens={spec.tokens}"
    return ""


def mqt_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    tokens, patches, width = spec.tokens, spec.grid[0] * spec.grid[1], spec.encoder_width
    return Cost(flops.attention_flops(tokens, patches, tokens * patches, spec.width, width, width, width))
