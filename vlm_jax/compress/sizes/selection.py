"""Sizes and costs of `compress.selection`: the V it can give, FLOPs, published defaults."""

from vlm_jax.compress.contract import Cost, Count
from vlm_jax.core.specs import CompressorSpec, EncoderSpec
from vlm_jax.ops.grid_shapes import GridShape


def attention_of_tokens(encoder: EncoderSpec) -> tuple[int, str]:
    """The block that gives the tokens, its heads averaged (VisionZip)."""
    return encoder.feature_layer or encoder.depth, "heads"


def attention_of_last(encoder: EncoderSpec) -> tuple[int, str]:
    """The last block, one softmax over the whole width (PruMerge)."""
    return encoder.depth, "width"


def zip_tokens(grid: GridShape) -> tuple[int, ...]:
    return tuple(range(1, grid[0] * grid[1] + 1))


def contextual_count(tokens: int) -> int:
    """c of V: 10 of 64, 20 of 128, 30 of 192 as published."""
    return round(tokens * 10 / 64)


def zip_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    """Cosines of all patches with the contextual ones, and the sums of tokens."""
    pairs = spec.grid[0] * spec.grid[1] * contextual_count(spec.tokens)
    return Cost(2.0 * pairs * (spec.key_width + spec.encoder_width))


def prumerge_tokens(grid: GridShape) -> tuple[int, ...]:
    return tuple(range(2, grid[0] * grid[1] + 1))


def prumerge_plus_tokens(grid: GridShape) -> tuple[int, ...]:
    return tuple(2 * n + 1 for n in range(1, (grid[0] * grid[1] - 1) // 2 + 1))


def prumerge_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    patches = spec.grid[0] * spec.grid[1]
    return Cost(2.0 * patches * spec.encoder_width * (spec.tokens - 1 + spec.tokens))


def divprune_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    patches = spec.grid[0] * spec.grid[1]
    return Cost(2.0 * patches**2 * spec.text_width, projected=patches)
