"""Compressors without weights: `none` (V = P), `blind` (V = 0) and `pool`, adaptive average pooling of the patch grid
(M3, arXiv 2405.17430; here with one V for each model, and before the projector).
"""

import jax

from vlm_jax.compress.contract import Cost, Count
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops import grid as g


def no_weights(key: jax.Array, spec: CompressorSpec) -> dict:
    return {}


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """Minimal inner sizes; none of them is used."""
    return CompressorSpec(name, tokens, encoder.grid, encoder.width, 0, decoder.width, encoder.width, 1, 1, 0)


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
