"""Compressors without weights of their own: the two ends, average pooling before and after the projector, and pixel
shuffling.

`none` V = P; `blind` V = 0; `pool` adaptive average pooling of the encoder's tokens.
`m3` (arXiv 2405.17430): all P tokens are projected, then averaged over equal cells; the weights serve every V.
`pixel_shuffle` (InternVL, arXiv 2404.16821): the r x r tokens of a cell side by side, [r r E], and a LayerNorm; the
    projector is an MLP.
`idefics3` (arXiv 2408.12637, also SmolVLM): the same without LayerNorm; the projector is one linear layer.
"""

import jax
import jax.numpy as jnp

from vlm_jax.compress import layers
from vlm_jax.compress.contract import Cost
from vlm_jax.compress.layers import Count, Weights
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops import grid as g


def no_weights(key: jax.Array, spec: CompressorSpec) -> dict:
    return {}


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """Minimal inner sizes; none of them is used."""
    return CompressorSpec(name, tokens, encoder.token_grid, encoder.width, 0, decoder.width, encoder.width, 1, 1, 0)


def no_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    return Cost(0.0)


def keep_all(weights: dict, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """V = P: the tokens unchanged."""
    return Prefix(evidence.tokens, evidence.mask)


def all_tokens(grid: g.GridShape) -> tuple[int, ...]:
    return (grid[0] * grid[1],)


def drop_all(weights: dict, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """V = 0: no visual tokens, the blind baseline."""
    return Prefix(evidence.tokens[:, :0], None if evidence.mask is None else evidence.mask[:, :0])


def no_tokens(grid: g.GridShape) -> tuple[int, ...]:
    return (0,)


def pool(weights: dict, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Token (i, j) of r x c is the mean of the valid patches in row bin i and column bin j."""
    (h, w), (r, c) = spec.grid, g.pooling_shapes(spec.grid)[spec.tokens]
    tokens, mask = g.weighted_mean(evidence.tokens, evidence.mask, g.bins(h, r), g.bins(w, c))
    return Prefix(tokens, mask)


def pool_tokens(grid: g.GridShape) -> tuple[int, ...]:
    return tuple(g.pooling_shapes(grid))


def pool_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    return Cost(g.weighted_mean_flops(spec.grid, g.pooling_shapes(spec.grid)[spec.tokens], spec.encoder_width))


def m3(weights: dict, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Token (i, j) is the mean of the projected valid patches of its cell."""
    (h, w), (r, c) = spec.grid, g.cell_shapes(spec.grid)[spec.tokens]
    return Prefix(*g.weighted_mean(evidence.project(evidence.tokens), evidence.mask, g.bins(h, r), g.bins(w, c)))


def cell_tokens(grid: g.GridShape) -> tuple[int, ...]:
    return tuple(g.cell_shapes(grid))


def m3_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    pooled = g.weighted_mean_flops(spec.grid, g.cell_shapes(spec.grid)[spec.tokens], spec.text_width)
    return Cost(pooled, projected=spec.grid[0] * spec.grid[1])


def shuffle_tokens(grid: g.GridShape) -> tuple[int, ...]:
    """V = P / r^2 for every r that divides both sides."""
    h, w = grid
    return tuple(h * w // r**2 for r in range(min(grid), 0, -1) if h % r == 0 and w % r == 0)


def shuffled_width(spec: CompressorSpec) -> int:
    return spec.grid[0] * spec.grid[1] // spec.tokens * spec.encoder_width


def shuffle(weights: dict, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """The tokens of a cell side by side, by row and then by column within the cell; masked ones are zero."""
    r = round((spec.grid[0] * spec.grid[1] / spec.tokens) ** 0.5)
    shape = (spec.grid[0] // r, spec.grid[1] // r)
    x, mask = evidence.tokens, evidence.mask
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0)
        mask = g.split_cells(mask, spec.grid, shape).any(-1)
    cells = g.split_cells(x, spec.grid, shape)
    return Prefix(cells.reshape(*cells.shape[:2], -1), mask)


def init_pixel_shuffle(key: jax.Array, spec: CompressorSpec) -> Weights:
    return {"norm": layers.init_norm(shuffled_width(spec))}


def pixel_shuffle(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """LayerNorm of the shuffled tokens."""
    cells = shuffle({}, evidence, spec)
    return cells._replace(tokens=layers.layer_norm(weights["norm"], cells.tokens, eps=1e-5))
