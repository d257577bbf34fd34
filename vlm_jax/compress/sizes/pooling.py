"""Sizes and costs of `compress.pooling`: the V it can give, FLOPs, published defaults."""

from vlm_jax.compress.contract import Cost, Count
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec
from vlm_jax.ops import grid_shapes
from vlm_jax.ops.grid_shapes import GridShape


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """Minimal inner sizes; none of them is used."""
    return CompressorSpec(name, tokens, encoder.token_grid, encoder.width, 0, decoder.width, encoder.width, 1, 1, 0)


def no_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    return Cost(0.0)


def all_tokens(grid: GridShape) -> tuple[int, ...]:
    return (grid[0] * grid[1],)


def no_tokens(grid: GridShape) -> tuple[int, ...]:
    return (0,)


def pool_tokens(grid: GridShape) -> tuple[int, ...]:
    return tuple(grid_shapes.pooling_shapes(grid))


def pool_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    return Cost(
        grid_shapes.weighted_mean_flops(
            spec.grid, grid_shapes.pooling_shapes(spec.grid)[spec.tokens], spec.encoder_width
        )
    )


def cell_tokens(grid: GridShape) -> tuple[int, ...]:
    return tuple(grid_shapes.cell_shapes(grid))


def m3_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    pooled = grid_shapes.weighted_mean_flops(
        spec.grid, grid_shapes.cell_shapes(spec.grid)[spec.tokens], spec.text_width
    )
    return Cost(pooled, projected=spec.grid[0] * spec.grid[1])


def shuffle_tokens(grid: GridShape) -> tuple[int, ...]:
    """V = P / r^2 for every r that divides both sides."""
    h, w = grid
    return tuple(h * w // r**2 for r in range(min(grid), 0, -1) if h % r == 0 and w % r == 0)


def shuffled_width(spec: CompressorSpec) -> int:
    return spec.grid[0] * spec.grid[1] // spec.tokens * spec.encoder_width
